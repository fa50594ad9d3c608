"""The same gradient everywhere: any number of processes, any strategy, both engines, any number of episodes.

float64 to 1e-10 where the strategy can (DeepSpeed cannot), float32 to 1e-6.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run_ranks
from parity_worker import ENGINES, EPISODES, FURTHER, NETS, OPTIMS, PER_RANK, RESUMED_BY, SLOW_BODY, ZERO

pytestmark = pytest.mark.timeout(5000)  # whichever test comes first waits for the workers
WORKER = str(Path(__file__).with_name("parity_worker.py"))
WORLDS = (2, 1, 4)
"""2 first: it saves the state that the others load."""
MATRIX = [(world, name) for world, names in ZERO.items() for name in names if name != FURTHER]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the workers saved, by world size."""
    folder = tmp_path_factory.mktemp("parity")
    compiled = folder / "compiled"
    found = {}
    for world in WORLDS:
        path = folder / f"world-{world}.pt"
        code, out = run_ranks(world, WORKER, str(path), TORCH_EXTENSIONS_DIR=str(compiled))
        assert code == 0, out
        assert "[INFO]" not in out and "[WARNING]" not in out, "DeepSpeed speaks on the terminal"
        found[world] = torch.load(path)
        assert found[world]["world"] == world, "another world than the one that was launched"
    assert not compiled.exists(), "DeepSpeed compiled an operator"
    return found


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in b)


def assert_same_in_float64(there, strategy, reference, net, engine, episodes):
    """The parameters of one process and ``graph``, by any engine."""
    key = f"float64/{net}/{{}}/{episodes}-{episodes}/sgd"
    found, expected = there[f"{strategy}/{key.format(engine)}"], reference[f"single/{key.format('graph')}"]
    assert largest_difference(without_norms(found), without_norms(expected)) < 1e-10, (strategy, net, engine)


def assert_same_in_float32(there, strategy, reference, net, engine, episodes):
    """The parameters of one process by the same engine; the clipped norm that was reported is the same too."""
    key = f"float32/{net}/{engine}/{'-'.join(map(str, episodes))}/sgd"
    found, expected = there[f"{strategy}/{key}"], reference[f"single/{key}"]
    assert (found["norms"] / expected["norms"] - 1)[0].abs() < 1e-5, key  # later ones see other decisions of ReLUs
    assert largest_difference(without_norms(found), without_norms(expected)) < 1e-6, key


def assert_same_adamw(there, strategy, reference, optimizer="adamw"):
    """Weight decay on matrices alone, bias correction by the true number of steps, also on partitions on the CPU."""
    key = f"float32/conv4/graph/5-5/{optimizer}"
    found, expected = there[f"{strategy}/{key}"], reference[f"single/{key}"]
    assert largest_difference(without_norms(found), without_norms(expected)) < 1e-6, strategy


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("episodes", EPISODES)
def test_any_world_and_engine_ends_at_the_same_parameters(results, net, engine, episodes):
    for world, strategy in ((1, "single"), (2, "ddp"), (4, "ddp")):
        assert_same_in_float64(results[world]["params"], strategy, results[1]["params"], net, engine, episodes)


@pytest.mark.parametrize(("world", "strategy"), MATRIX)
@pytest.mark.parametrize("engine", ENGINES)
def test_zero_ends_at_the_parameters_of_one_process(results, world, strategy, engine):
    """1, 2 and 3 episodes a rank, and uneven."""
    for net in NETS if world == 2 else ("vit",):
        found = results[world]["params"]
        assert_same_in_float32(found, strategy, results[1]["params"], net, engine, PER_RANK[world])


def test_zero_runs_the_adamw_that_was_asked_for(results):
    for world, strategy in ((1, "zero3+all"), *((2, name) for name in ZERO[2]), *((4, name) for name in ZERO[4])):
        assert_same_adamw(results[world]["params"], strategy, results[1]["params"])


@pytest.mark.parametrize(("world", "strategy"), MATRIX)
def test_the_body_keeps_its_part_of_the_step_size(results, world, strategy):
    """optim.body_lr_scale, whose groups each strategy cuts into partitions of its own."""
    assert_same_adamw(results[world]["params"], strategy, results[1]["params"], SLOW_BODY)


def test_the_matrix_can_tell_runs_apart(results):
    """Another number of episodes a step, or another optimizer, ends elsewhere: the parameters have moved enough."""
    params = results[2]["params"]
    for net in NETS:
        one, two = (params[f"ddp/float64/{net}/adjoint/{n}-{n}/sgd"] for n in (1, 4))
        assert largest_difference(without_norms(one), without_norms(two)) > 1e-4
        one, two = (results[1]["params"][f"single/float32/{net}/graph/{n}/sgd"] for n in ("4-5", "2-4-6-5"))
        assert largest_difference(without_norms(one), without_norms(two)) > 2e-5
    sgd, adamw = (params[f"zero2/float32/conv4/graph/{name}"] for name in ("2-4-6-5/sgd", "5-5/adamw"))
    assert largest_difference(without_norms(sgd), without_norms(adamw)) > 1e-3
    slow = params[f"zero2/float32/conv4/graph/5-5/{SLOW_BODY}"]
    assert largest_difference(without_norms(slow), without_norms(adamw)) > 1e-3


@pytest.mark.parametrize("optimizer", OPTIMS)
def test_state_of_one_strategy_resumes_under_another(results, optimizer):
    """Saved by zero3 on 2 ranks with all on the CPU: the same to the bit once loaded, and the same further step."""
    state = results[2]["state"][optimizer]
    names = {name for name in state if name.startswith("param/")}
    assert len(state) == 4 * len(names), "AdamW keeps exp_avg, exp_avg_sq and step of each parameter"
    assert {state[name].item() for name in state if name.startswith("moment/step/")} == {2.0}
    reference = results[1]["resumed"]["single"][optimizer]["further"]
    assert largest_difference(reference, state) > 1e-4
    for world, strategies in RESUMED_BY.items():
        for strategy in strategies:
            there = results[world]["resumed"][strategy][optimizer]
            assert there["loaded"].keys() == state.keys()
            for name, tensor in state.items():
                assert same_bits(there["loaded"][name], tensor), (world, strategy, name)
            assert largest_difference(there["further"], reference) < 1e-6, (world, strategy)


@pytest.mark.parametrize("optimizer", OPTIMS)
@pytest.mark.parametrize("strategy", ("ddp", *ZERO[2]))
def test_a_skipped_step_leaves_nothing_behind(results, strategy, optimizer):
    """A NaN on one rank: no rank steps, and the next step is as if it had never been."""
    for name, (with_nan, without) in results[2]["skipped"][strategy][optimizer].items():
        assert torch.equal(with_nan, without), name


@pytest.mark.parametrize("strategy", ("ddp", *ZERO[2]))
def test_each_strategy_communicates_no_more_than_it_needs(results, strategy):
    """Elements per meta-step on 2 ranks: the gradient is reduced once, and parameters are gathered at most once."""
    found = {kind: sorted(numels) for kind, numels in results[2]["collectives"][strategy].items()}
    (elements,) = found.pop("elements")
    gradient, norms = [n for n in found.pop("allreduce", []) if n > 1], strategy not in ("ddp", "zero0")
    reduced, scattered, gathered = (sum(found.pop(kind, [])) for kind in ("reduce", "reduce_scatter", "allgather"))
    assert not found, "some other collective"
    stage = int(strategy[4]) if norms else 0
    padding = 100  # of partitions, up to an alignment each
    # To all ranks, or each part to the one rank that owns it.
    assert sum(gradient) == (elements if stage == 0 else 0)
    assert reduced == (elements if stage in (1, 2) else 0)
    assert scattered == 0 if stage != 3 else elements <= scattered <= elements + padding
    # After the step the new parts of the others (1, 2), before the forward all parts (3).
    assert gathered == 0 if stage == 0 else elements <= gathered <= elements + padding


def without_norms(found):
    return {name: value for name, value in found.items() if name != "norms"}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
