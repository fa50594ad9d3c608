"""The parity matrix on GPUs: one GPU under every strategy, and as many ranks over NCCL as there are GPUs."""

from __future__ import annotations

import itertools

import pytest
import torch
from launching import ROOT, run
from parity_worker import ENGINES, EPISODES, FURTHER, NETS, PER_RANK, ZERO
from test_parity import WORKER, assert_same_adamw, assert_same_in_float32, assert_same_in_float64

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

pytestmark = pytest.mark.timeout(5000)  # whichever test comes first waits for the workers
GPU_LAUNCH = ROOT / "launch" / "accelerate" / "ddp.yaml"


def world_of(folder, size: int, device: str) -> dict[str, dict]:
    """Parameters by case, of a launch of ``size`` ranks."""
    if device == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"{size} ranks need {size} GPUs")
    path = folder / f"{device}-{size}.pt"
    seen = ",".join(map(str, range(size))) if device == "cuda" else ""
    code, out = run(size, WORKER, str(path), device, launch_file=GPU_LAUNCH, CUDA_VISIBLE_DEVICES=seen)
    assert code == 0, out
    assert "[INFO]" not in out and "[WARNING]" not in out, f"DeepSpeed speaks on the terminal:\n{out}"
    found = torch.load(path)
    assert found["world"] == size, "another world than the one that was launched"
    return found["params"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def one(folder):
    """All strategies on one GPU."""
    return world_of(folder, 1, "cuda")


@pytest.fixture(scope="module", params=[2, 4])
def several(request, folder):
    return request.param, world_of(folder, request.param, "cuda")


@pytest.fixture(scope="module")
def on_the_cpu(folder):
    return world_of(folder, 1, "cpu")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("episodes", EPISODES)
def test_one_gpu_ends_at_the_parameters_of_the_cpu(one, on_the_cpu, net, episodes):
    for engine in ENGINES:
        assert_same_in_float64(one, "single", on_the_cpu, net, engine, episodes)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("episodes", EPISODES)
def test_several_gpus_end_at_the_parameters_of_one(several, one, net, episodes):
    for engine in ENGINES:
        assert_same_in_float64(several[1], "ddp", one, net, engine, episodes)


def same_as_one_process(there, one, strategy, nets, per_rank):
    for net, engine in itertools.product(nets, ENGINES):
        assert_same_in_float32(there, strategy, one, net, engine, per_rank)
    assert_same_adamw(there, strategy, one)


@pytest.mark.parametrize("strategy", ZERO[2])
def test_zero_on_one_gpu_ends_at_the_parameters_of_one_process(one, strategy):
    same_as_one_process(one, one, strategy, () if strategy == FURTHER else NETS, PER_RANK[2])


@pytest.mark.parametrize("strategy", ZERO[2])
def test_zero_on_several_gpus_ends_at_the_parameters_of_one_process(several, one, strategy):
    size, there = several
    if strategy not in ZERO[size]:
        pytest.skip(f"not of the matrix with {size} ranks")
    nets = () if strategy == FURTHER else NETS if size == 2 else ("vit",)
    same_as_one_process(there, one, strategy, nets, PER_RANK[size])
