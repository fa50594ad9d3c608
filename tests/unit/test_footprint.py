"""Predicted memory against closed forms, against the live bytes of real runs, and against a process's own peak."""

from __future__ import annotations

import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cml_dist.memory import footprint as module
from cml_dist.memory.footprint import meta_step_footprint
from cml_dist.memory.live_bytes import LiveBytes
from cml_dist.meta.gradient import Engine
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.methods.inner_optim import Adam
from cml_dist.methods.maml_pp import MamlPlusPlus
from cml_dist.methods.meta_sgd import MetaSgd
from cml_dist.nets.mlp import MLP
from cml_dist.nets.network import CmlNet
from cml_dist.types import Batch, EachTime, Episode

ROOT = Path(__file__).resolve().parents[2]
WIDTH, EXAMPLES, DEPTH = 32, 200, 3
METHOD = Method.sgd(inner_steps=4, body_lr=0.1, head_lr=0.1, gamma=1.0)


def loss(outputs, targets):
    return nn.functional.mse_loss(outputs, targets)


def network() -> CmlNet:
    return CmlNet(MLP(WIDTH, (WIDTH,) * DEPTH), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1))


def episode(support: int = 40, query: int = 30) -> Episode:
    def batch(count: int) -> Batch:
        return Batch(torch.randn(count, WIDTH), torch.randn(count, 1))

    return Episode(batch(support), batch(query), "train", 0)


def predicted(engine: Engine | str, method: Method = METHOD, **options):
    given = options.pop("episode", None) or episode()
    return meta_step_footprint(network(), loss, loss, method, engine, given, **options)


@pytest.fixture
def nothing_left_out(monkeypatch):
    """Simulates every step, episode and micro-batch."""

    def switch() -> None:
        monkeypatch.setattr(module, "STEPS", 10**6)
        monkeypatch.setattr(module, "_shortened", lambda given, micro_batch: given)

    return switch


# --------------------------------------------------------------------------- live bytes


def test_counts_a_storage_from_its_operator_to_its_last_reference():
    row = torch.randn(256)  # 1 KiB
    with LiveBytes() as live:
        live.standing([row])
        doubled = row * 2
        view = doubled[:10]
        del doubled
        assert live.live == 1024  # the view keeps all of it
        tripled = row * 3
        row.add_(1)
        assert live.live == 2048
        del view, tripled
        assert (live.live, live.peak) == (0, 2048)


def test_what_autograd_keeps_of_a_stack_of_layers_is_counted_by_hand():
    map_bytes = EXAMPLES * WIDTH * 4
    with FakeTensorMode():
        weights = [torch.empty(WIDTH, WIDTH, requires_grad=True) for _ in range(DEPTH)]
        values = torch.empty(EXAMPLES, WIDTH)
        with LiveBytes() as live:
            live.standing([*weights, values])
            for weight in weights:
                values = (values @ weight).tanh()
            # tanh keeps its result, which the next product keeps too; products themselves are nobody's.
            assert live.live == DEPTH * map_bytes
            assert live.peak == (DEPTH + 1) * map_bytes
            total = values.sum()
            del values
            torch.autograd.grad(total, weights)
            assert live.live == 4  # the sum


# --------------------------------------------------------------------------- a meta-step


@pytest.mark.parametrize(
    ("engine", "order", "micro_batch", "ascent"),
    [
        *(("graph", 2, size, 0.0) for size in (None, 13)),
        *(("adjoint", 2, size, 0.0) for size in (None, 7)),
        ("adjoint", 1, 7, 0.0),
        ("graph", 2, None, 0.1),
        ("adjoint", 2, 7, 0.1),
    ],
)
def test_equals_the_live_bytes_of_a_real_meta_step(engine, order, micro_batch, ascent):
    torch.manual_seed(0)
    method, given, net = replace(METHOD, order=order, ascent=ascent), episode(), network()
    model = MetaModel(net, loss, loss, method, engine, micro_batch=micro_batch)
    with LiveBytes() as live:
        live.standing([*model.parameters(), *model.buffers()])

        def some():
            made = (batch.map(torch.clone) for _ in range(3) for batch in (given.support, given.query))
            return (replace(given, support=next(made), query=next(made)) for _ in range(3))

        total, _ = model(EachTime(some), 1 / 3, frozenset({given.index}))
        total.backward()
    found = meta_step_footprint(net, loss, loss, method, engine, given, episodes=3, micro_batch=micro_batch)
    # A map is 5 KiB. What may differ: outputs of micro-batches that were left out, numbers that operators wrap.
    assert live.peak - 70 * 2 * 4 - 512 <= found.peak <= live.peak


@pytest.mark.parametrize(
    ("rule", "copies", "engine", "trajectory", "order", "micro_batch"),
    [
        (MetaSgd, 1, "graph", "all", 2, None),
        (Adam, 3, "graph", "all", 2, None),
        (InnerRule, 1, "adjoint", "all", 2, 13),
        (Adam, 3, "adjoint", "all", 2, 13),
        (MetaSgd, 1, "adjoint", "sqrt", 2, None),
        (partial(MamlPlusPlus, steps=9, multi_step_loss=1), 1, "graph", "all", 2, None),
        (partial(MamlPlusPlus, steps=9, multi_step_loss=1), 1, "adjoint", "all", 2, 13),
        (InnerRule, 1, "adjoint", "sqrt", 1, None),
        (Adam, 3, "adjoint", "sqrt", 1, None),
    ],
)
def test_holds_for_any_rule_and_any_kept_points(rule, copies, engine, trajectory, order, micro_batch):
    """Against real live bytes, at K = 9, where sqrt holds 5 points; Adam's have its moments with them."""
    torch.manual_seed(0)
    method, given, net = Method(9, rule(0.1, 0.1), 1.0, order), episode(), network()
    net.add_rule(method.rule.init(net.adaptable()))
    model = MetaModel(net, loss, loss, method, Engine(engine, trajectory), micro_batch=micro_batch)
    with LiveBytes() as live:
        live.standing([*model.parameters(), *model.buffers(), given.support.inputs, given.query.inputs])
        model([given], 1.0, frozenset({given.index}))[0].backward()
    found = meta_step_footprint(net, loss, loss, method, Engine(engine, trajectory), given, micro_batch=micro_batch)
    a_copy = sum(p.numel() * 4 for name, p in net.named_parameters() if name.startswith(("body", "head")))
    assert found.peak - found.episode == pytest.approx(live.peak, rel=0.02, abs=1024)  # the episode was there before
    held = 5 if trajectory == "sqrt" else 9
    if order == 2 or rule is not InnerRule:  # of SGD at first order no step is kept
        assert found.adapted == copies * a_copy * held


@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_a_straight_line_in_inner_steps_says_what_simulating_all_of_them_says(engine, nothing_left_out):
    shortcut = predicted(engine)
    nothing_left_out()
    assert shortcut == predicted(engine)


def test_adjoint_grows_by_a_copy_of_what_adapts_for_each_step_and_graph_by_a_graph():
    steps = [replace(METHOD, inner_steps=count) for count in (4, 5)]
    copy = sum(p.numel() * 4 for name, p in network().named_parameters() if not name.startswith("colearner"))
    adjoint = [predicted("adjoint", method) for method in steps]
    assert adjoint[1].peak - adjoint[0].peak == copy == adjoint[1].adapted - adjoint[0].adapted
    assert adjoint[1].activations == adjoint[0].activations
    graph = [predicted("graph", method) for method in steps]
    assert graph[1].peak - graph[0].peak > copy + DEPTH * 40 * WIDTH * 4  # activations of a step, at the least


def test_offloaded_copies_do_not_grow_with_inner_steps():
    away = Engine("adjoint", device=torch.device("cpu"))
    few, many = (predicted(away, replace(METHOD, inner_steps=n)).peak for n in (3, 30))
    assert few == many < predicted("adjoint", replace(METHOD, inner_steps=30)).peak


@pytest.mark.parametrize("micro_batch", [3, 7])
def test_two_micro_batches_and_the_rest_stand_for_all(micro_batch, nothing_left_out):
    method, sets = replace(METHOD, inner_steps=2), {"episode": episode(25, 16), "micro_batch": micro_batch}
    shortcut = predicted("adjoint", method, **sets)
    nothing_left_out()
    whole = predicted("adjoint", method, **sets)
    assert 0 <= whole.peak - shortcut.peak <= 41 * 2 * 4  # the outputs of those left out
    assert whole.episode == shortcut.episode
    assert whole.peak < predicted("adjoint", method, episode=sets["episode"]).peak


def test_a_network_is_left_as_it_was_and_its_type_counts():
    net = network()
    before = {name: (p.device, p.data_ptr()) for name, p in net.named_parameters()}
    single = meta_step_footprint(net, loss, loss, METHOD, "adjoint", episode())
    assert before == {name: (p.device, p.data_ptr()) for name, p in net.named_parameters()}
    given = episode()
    sets = {name: getattr(given, name).map(torch.Tensor.double) for name in ("support", "query")}
    double = meta_step_footprint(net.double(), loss, loss, METHOD, "adjoint", replace(given, **sets))
    assert double.peak == pytest.approx(2 * single.peak, rel=1e-3)


def test_autocast_takes_less_than_float32():
    assert predicted("adjoint", autocast=torch.bfloat16).activations < predicted("adjoint").activations


@pytest.mark.slow
def test_a_process_needs_what_was_predicted():
    """Conv-4 at 84 px: resident memory above the built model, in a process that gives freed memory back."""

    bench = runpy.run_path(str(ROOT / "benchmarks" / "plan.py"))
    case = ("conv4", 84, 1, "graph", None)
    measured = bench["in_fresh_process"](*case, "given back")["gib"]
    assert bench["predict"](*case)["gib"] == pytest.approx(measured, rel=0.15)


def test_a_fake_cpu_and_the_meta_device_say_the_same(monkeypatch):
    """Autocast and offloading need tensors that know where they are; all else runs on the meta device."""
    on_meta = predicted("adjoint", micro_batch=7)
    monkeypatch.setattr(module, "ELSEWHERE", torch.device("cpu"))
    monkeypatch.setattr(module, "LiveBytes", lambda scratch, elsewhere: LiveBytes(scratch))
    on_fake_cpu = predicted(Engine("adjoint", device=torch.device("cpu")), micro_batch=7)  # to where they are
    assert on_fake_cpu.peak + 2 * (on_meta.adapted // METHOD.inner_steps) == on_meta.peak
