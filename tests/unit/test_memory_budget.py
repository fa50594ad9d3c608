"""The means that a memory budget allows: chosen, named, kept, and the same gradient."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cml_dist.config.load import parse_config
from cml_dist.config.plan import make_plan
from cml_dist.errors import ConfigError
from cml_dist.memory.choose import MemoryPlanner, engine_of, fit_memory, in_words, model_size
from cml_dist.memory.live_bytes import LiveBytes
from cml_dist.memory.strategies import Strategy
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import Method
from cml_dist.nets.build import build_net
from cml_dist.types import Batch, Episode

SHAPE, WAYS, SHOTS, QUERIES = (6,), 4, 2, 4
CPU, SINGLE = torch.device("cpu"), Strategy("single")


def settings(backbone="mlp", steps=1, engine="adjoint", micro_batch="auto", **sections):
    data = {
        "engine": {"name": engine, "micro_batch": micro_batch},
        "domain": {"name": "images", "root": "unused", "ways": WAYS, "shots": SHOTS, "queries": QUERIES},
        # Narrower than the batch is long, so that activations count for more than parameters; few operators.
        "model": {"backbone": backbone, "hidden": [2] * 2, "filters": 2, "colearner": {"depth": 1, "width": 8}},
        "method": {"inner_steps": steps},
        "optim": {"name": "sgd"},
    }
    return parse_config({**data, **sections})


def made(config, dtype=torch.float32, shape=None):
    shape = shape or SHAPE
    net = build_net(config.model, input_shape=shape, output_dim=WAYS, seed=0, colearner=True).to(dtype)
    generator = torch.Generator().manual_seed(0)

    def batch(each):
        inputs = torch.randn(each * WAYS, *shape, generator=generator, dtype=dtype)
        return Batch(inputs, torch.arange(WAYS).repeat_interleave(each))

    episode = Episode(batch(SHOTS), batch(QUERIES), "train", 0)
    task = SimpleNamespace(
        episode=episode,
        input_shape=shape,
        output_dim=WAYS,
        largest_episode=lambda dtype: None,
        loss=torch.nn.functional.cross_entropy,
        score=lambda o, t: (o.argmax(1) == t).to(dtype).mean(),
    )
    return net, task, Method.sgd(config.method.inner_steps, 0.1, 0.1, gamma=0.7)


def fit(config, budget_gib=None, shape=None):
    net, task, method = made(config, shape=shape)
    if budget_gib is not None:
        config = config.model_copy(update={"memory": config.memory.model_copy(update={"budget_gib": budget_gib})})
    return fit_memory(config, make_plan(config, 1, {}), net, method, task, CPU)


def planner_of(config, on_gpu=False, shape=None):
    net, task, method = made(config, shape=shape)
    return MemoryPlanner(config, make_plan(config, 1, {}), net, method, task, on_gpu=on_gpu)


def gib(planner, means):
    return planner.bytes_needed(SINGLE, means, 1) / 2**30


def test_without_a_budget_nothing_is_chosen():
    config = settings()
    assert fit(config) == make_plan(config, 1, {})


def test_candidates_go_from_whole_to_one_example_and_then_off_the_gpu():
    found = planner_of(settings(engine="auto")).candidates()
    assert [m.engine for m in found[:2]] == ["graph", "adjoint"]
    assert [m.micro_batch for m in found] == [None, None, 8, 4, 2, 1]
    on_gpu = planner_of(settings(steps=3), on_gpu=True).candidates()
    assert [m.trajectory_device for m in on_gpu] == ["device"] * 5 + ["cpu"] * 4


def test_each_candidate_needs_less_than_the_one_before():
    """What the search by halving rests on."""
    planner = planner_of(settings(steps=3), on_gpu=True)
    device, cpu = (
        [gib(planner, replace(planner.plan, micro_batch=size, trajectory_device=copies)) for size in sizes]
        for copies, sizes in (("device", (None, 8, 2, 1)), ("cpu", (8, 1)))
    )
    assert device == sorted(device, reverse=True) and cpu == sorted(cpu, reverse=True)
    assert cpu[-1] < device[-1], "keeping the copies elsewhere saves something"


@pytest.fixture(scope="module")
def planner():
    """Of the plain settings; what it has simulated once serves all."""
    return planner_of(settings())


def test_the_largest_micro_batch_that_fits_is_taken_and_the_reason_said(planner):
    needs = {size: gib(planner, replace(planner.plan, micro_batch=size)) for size in (4, 8)}
    plan = fit(settings(), (needs[4] + needs[8]) / 2)
    assert (plan.engine, plan.micro_batch) == ("adjoint", 4)
    assert "in micro-batches of 4" in plan.memory and "adjoint whole would need" in plan.memory
    assert fit(settings(), 1.0).micro_batch is None


@pytest.mark.parametrize(("steps", "on_gpu"), [(3, True), (5, False)])
def test_of_all_that_fit_the_first_is_taken(steps, on_gpu):
    """Also where the copies of the steps lie on the CPU, or are made again: with these, whole sets need more again."""
    planner = planner_of(settings(steps=steps), on_gpu=on_gpu)
    needs = {means: planner.bytes_needed(SINGLE, means, 1) for means in planner.candidates()}
    for budget in needs.values():
        assert planner.choose(SINGLE, 1, budget) == next(means for means, need in needs.items() if need <= budget)


def test_what_was_asked_for_by_name_stays():
    with pytest.raises(ConfigError, match="graph whole under single"):
        fit(settings(engine="graph"), 1e-6)
    with pytest.raises(ConfigError, match="micro-batches of 4 under single"):
        fit(settings(micro_batch=4), 1e-6)


def test_a_budget_that_nothing_fits_names_the_smallest_that_would(planner):
    least = gib(planner, planner.candidates()[-1])
    with pytest.raises(ConfigError, match="nothing fits into") as refused:
        fit(settings(), 0.99 * least)
    named = float(re.search(r"memory.budget_gib to ([\d.]+) or more", str(refused.value)).group(1))
    assert least <= named < least + 0.001
    assert fit(settings(), least + 1e-9).micro_batch == 1


def test_batch_statistics_are_never_split():
    image = (3, 16, 16)
    assert all(m.micro_batch is None for m in planner_of(settings("conv4"), shape=image).candidates())
    with pytest.raises(ConfigError, match="couples examples"):
        fit(settings("conv4", micro_batch=2), shape=image)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_the_run_stays_inside_its_budget(part, planner):
    """The bytes of real tensors in a real meta-step, counted as they come and go."""
    config = settings()
    net, task, method = made(config)
    least, most = (gib(planner, planner.candidates()[n]) for n in (-1, 0))
    budget = least + part * (most - least)
    plan = fit(config, budget)
    model = MetaModel(net, task.loss, task.score, method, plan.engine, micro_batch=plan.micro_batch)
    with LiveBytes() as live:
        live.standing([*model.parameters(), *model.buffers(), task.episode.support.inputs, task.episode.query.inputs])
        model([task.episode], 1.0)[0].backward()
    size = model_size(config, net)
    assert live.peak + size.parameters + size.constants <= budget * 2**30
    assert (plan.micro_batch is None) == (part == 1.0)


@pytest.mark.parametrize("steps", [1, 3])
def test_any_means_gives_the_same_gradient(steps):
    config = settings(steps=steps, engine="auto", run={"precision": "fp64"})
    net, task, method = made(config, torch.float64)
    found = {}
    for means in planner_of(config, on_gpu=True).candidates():
        model = MetaModel(net, task.loss, task.score, method, engine_of(means), micro_batch=means.micro_batch)
        model([task.episode], 1.0)[0].backward()
        found[means] = torch.cat([p.grad.flatten() for p in model.values])
    reference = found[next(means for means in found if means.engine == "graph")]
    for means, grad in found.items():
        assert (grad - reference).norm() / reference.norm() < 1e-12, in_words(means)


@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_memory_is_flat_in_episodes(engine):
    """The second episode meets the sums that the first left behind, and no later one meets more."""
    config = settings()
    net, task, method = made(config)
    peaks = []
    for count in (2, 5):
        model = MetaModel(net, task.loss, task.score, method, engine)
        with LiveBytes() as live:
            live.standing([*model.parameters(), *model.buffers()])
            made_episodes = (replace(task.episode, index=index) for index in range(count))
            model(made_episodes, 1.0)[0].backward()
        peaks.append(live.peak)
    assert abs(peaks[1] - peaks[0]) <= 64, "no more than the sums of a few terms"
