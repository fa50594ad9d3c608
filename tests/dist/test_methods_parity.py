"""Every method, head and kind of co-learner under every strategy: what 2 processes compute is what one does.

By the adjoint engine. float64 to 1e-10 under ddp, float32 to 1e-6 under ZeRO (DeepSpeed has no float64).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from launching import run_ranks
from methods_worker import CASES, EPISODES, FURTHER, REDUCED_INSIDE, RUNS, ZERO, make

from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.run.stream import rank_share

pytestmark = pytest.mark.timeout(3600)  # whichever test comes first waits for the workers
WORKER = str(Path(__file__).with_name("methods_worker.py"))
TOLERANCE = {"float64": 1e-10, "float32": 1e-6}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the workers saved, by ``strategy/type`` and case."""
    folder, found = tmp_path_factory.mktemp("methods"), {}
    for world in RUNS:
        path = folder / f"world-{world}.pt"
        code, out = run_ranks(world, WORKER, str(path))
        assert code == 0, out
        saved = torch.load(path)
        assert saved["world"] == world, "another world than the one that was launched"
        found |= saved["found"]
    return found


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in b)


def assert_same(found, expected, dtype):
    """Parameters after all steps, norms that were reported, and sums of terms over the ranks with their counts."""
    tolerance = TOLERANCE[dtype]
    assert (found["norms"] / expected["norms"] - 1).abs().max() < 10 * tolerance
    assert {p.dtype for p in found["params"].values()} == {getattr(torch, dtype)}
    assert largest_difference(found["params"], expected["params"]) < tolerance
    assert found["terms"].keys() == expected["terms"].keys() >= {"loss", "outer_loss", "score", "colearner_loss"}
    for term, (total, count) in expected["terms"].items():
        assert found["terms"][term][1] == count == sum(EPISODES), term
        assert found["terms"][term][0].item() == pytest.approx(total.item(), rel=tolerance), term


def by_graph(name, alone=False):
    """The first meta-gradient of a case, made here by ``graph``.

    Args:
        alone: as if each of two ranks clamped and ascended by its own share, and the wrapper took the mean.
    """
    case = CASES[name]
    net, method, domain = make(case)
    problem = Problem(net, domain.loss, domain.score, dict(net.named_buffers()))
    params = {n: p.detach() for n, p in net.named_parameters()}

    def mean_at(point, indices):
        episodes = [domain.prepare(domain.episode("train", i), torch.device("cpu"), torch.float64) for i in indices]
        each = [meta_gradient(point, episode, problem, method, "graph").grads for episode in episodes]
        return {n: sum(grads[n] for grads in each) / len(episodes) for n in params}

    shares, mean = [rank_share(0, EPISODES[0], rank, 1 + alone) for rank in range(1 + alone)], {}
    for indices in shares:
        grads = mean_at(params, indices)
        if case.ascent:
            norm = torch.cat([g.flatten() for g in grads.values()]).norm()
            grads = mean_at({n: p + case.ascent * grads[n] / norm for n, p in params.items()}, indices)
        if case.clip_value is not None:
            grads = {n: g.clamp(-case.clip_value, case.clip_value) for n, g in grads.items()}
        mean = {n: mean.get(n, 0.0) + g * (len(indices) / EPISODES[0]) for n, g in grads.items()}
    return mean


@pytest.mark.parametrize("name", CASES)
def test_one_process_has_the_mean_of_its_episodes(results, name):
    """The reference itself: its first meta-gradient is the mean of those of ``graph``, made here."""
    mean, found = by_graph(name), results["single/float64"][name]
    assert largest_difference(found["grads"], mean) < 1e-12
    norm = torch.cat([g.flatten() for g in mean.values()]).norm()
    assert found["norms"][0].item() == pytest.approx(norm.item(), rel=1e-12)


@pytest.mark.parametrize("name", REDUCED_INSIDE)
def test_what_each_rank_would_do_alone_is_another_method(results, name):
    """An ascent by a rank's own share, or a clamp of it: two ranks have the gradient of one, and not that."""
    assert largest_difference(results["ddp/float64"][name]["grads"], by_graph(name, alone=True)) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_ddp_is_one_process(results, name):
    found, expected = (results[f"{strategy}/float64"][name] for strategy in ("ddp", "single"))
    assert largest_difference(found["grads"], expected["grads"]) < 1e-10
    assert_same(found, expected, "float64")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", ZERO)
def test_zero_is_one_process(results, strategy, name):
    assert_same(results[f"{strategy}/float32"][name], results["single/float32"][name], "float32")


@pytest.mark.parametrize("name", REDUCED_INSIDE)
@pytest.mark.parametrize("strategy", FURTHER)
def test_what_is_reduced_inside_a_meta_step_is_so_under_any_other_strategy(results, strategy, name):
    assert_same(results[f"{strategy}/float32"][name], results["single/float32"][name], "float32")


@pytest.mark.parametrize("name", ["ddp/float64", *(f"{strategy}/float32" for strategy in ZERO)])
def test_cosines_of_all_ranks_are_those_of_one_process(results, name):
    """Each episode's once, also those of a step in which a rank has none."""
    tolerance = TOLERANCE[name.partition("/")[2]]
    (total, count), (expected, number) = (
        results[run_name]["maml"]["terms"]["gradient_cosine"] for run_name in (name, f"single/{name.partition('/')[2]}")
    )
    assert count == number == sum(EPISODES)
    assert total.item() == pytest.approx(expected.item(), abs=tolerance * count.item())
    assert 0.01 < abs(expected / number) < 0.99


@pytest.mark.parametrize("name", CASES)
def test_the_matrix_would_notice_a_lost_gradient(results, name):
    """Every parameter moves by more than any tolerance: ``rule.*`` and what a head owns too."""
    net, _, _ = make(CASES[name])
    before, after = dict(net.named_parameters()), results["single/float64"][name]["params"]
    assert before.keys() == after.keys()
    moved = {n: (after[n] - p.detach()).abs().max().item() for n, p in before.items()}
    if "co" in net.compared:
        assert moved.pop("colearner.bias" if "colearner.bias" in moved else "colearner.1.bias") < 1e-10  # cancels out
    assert min(moved.values()) > 1e-4, moved
    assert {"head.log_lambda", "head.scale", "head.offset"} <= moved.keys() or name != "ridge"
    assert any(n.startswith("rule.") for n in moved) == (name in ("meta_sgd", "maml_pp", "lora", "lora_frozen"))
    assert any(n.startswith("colearner.") for n in moved) == (name != "untrained")


def test_the_matrix_can_tell_methods_apart(results):
    """Any two on one body, which begins alike, end with another body (with another head, where the body is frozen)."""
    for dtype in TOLERANCE:
        params = {name: found["params"] for name, found in results[f"single/{dtype}"].items()}
        for one, two in itertools.combinations(CASES, 2):
            if CASES[one].body == CASES[two].body:
                part = "head." if CASES[one].frozen or CASES[two].frozen else "body."
                names = [n for n in params[one].keys() & params[two].keys() if n.startswith(part)]
                if not names:
                    continue  # heads of other kinds
                first, second = ({n: params[c][n] for n in names} for c in (one, two))
                assert largest_difference(first, second) > 1e-5, (one, two)
