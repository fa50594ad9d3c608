"""The same gradient everywhere: 1, 2 and 4 processes, both engines, any number of episodes, in float64 to 1e-10."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run
from parity_worker import ENGINES, EPISODES, NETS

WORKER = str(Path(__file__).with_name("parity_worker.py"))
WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Parameters after a few meta-steps, by world size and case."""
    found = {}
    for world in WORLDS:
        path = tmp_path_factory.mktemp("parity") / f"world-{world}.pt"
        code, out = run(world, WORKER, str(path), timeout_s=280)
        assert code == 0, out
        saved = torch.load(path)
        assert saved["world"] == world, "another world than the one that was launched"
        found[world] = saved["params"]
    return found


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in b)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("episodes", EPISODES)
def test_any_world_and_engine_ends_at_the_same_parameters(results, net, engine, episodes):
    reference = results[1][f"{net}/graph/{episodes}/sgd"]
    for world in WORLDS:
        assert largest_difference(results[world][f"{net}/{engine}/{episodes}/sgd"], reference) < 1e-10, world


@pytest.mark.timeout(900)
def test_the_matrix_can_tell_runs_apart(results):
    """Another number of episodes a step ends elsewhere: the parameters compared above have moved."""
    for net in NETS:
        one, two = (results[2][f"{net}/adjoint/{n}/sgd"] for n in (1, 4))
        assert largest_difference(one, two) > 1e-4
