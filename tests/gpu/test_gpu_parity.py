"""The parity matrix on GPUs: one GPU under every strategy, and as many ranks over NCCL as there are GPUs."""

from __future__ import annotations

import pytest
import torch
from launching import ROOT, run
from parity_worker import ENGINES, EPISODES, FURTHER, NETS, PER_RANK, ZERO
from test_parity import WORKER, largest_difference, without_norms

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

pytestmark = pytest.mark.timeout(1800)  # whichever test comes first waits for the workers
GPU_LAUNCH = ROOT / "launch" / "accelerate" / "ddp.yaml"


def world_of(folder, size: int, device: str) -> dict[str, dict]:
    """Parameters by case, of a launch of ``size`` ranks."""
    if device == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"{size} ranks need {size} GPUs")
    path = folder / f"{device}-{size}.pt"
    seen = ",".join(map(str, range(size))) if device == "cuda" else ""
    code, out = run(size, WORKER, str(path), device, timeout_s=900, launch_file=GPU_LAUNCH, CUDA_VISIBLE_DEVICES=seen)
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


def same_in_float64(there, strategy, reference, net, episodes):
    for engine in ENGINES:
        key = f"float64/{net}/{engine}/{episodes}-{episodes}/sgd"
        expected = without_norms(reference[f"single/float64/{net}/graph/{episodes}-{episodes}/sgd"])
        assert largest_difference(without_norms(there[f"{strategy}/{key}"]), expected) < 1e-10, engine


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("episodes", EPISODES)
def test_one_gpu_ends_at_the_parameters_of_the_cpu(one, on_the_cpu, net, episodes):
    same_in_float64(one, "single", on_the_cpu, net, episodes)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("episodes", EPISODES)
def test_several_gpus_end_at_the_parameters_of_one(several, one, net, episodes):
    same_in_float64(several[1], "ddp", one, net, episodes)


def same_in_float32(there, reference, strategy, nets, per_rank):
    for net in nets:
        for engine in ENGINES:
            key = f"float32/{net}/{engine}/{'-'.join(map(str, per_rank))}/sgd"
            found, expected = there[f"{strategy}/{key}"], reference[f"single/{key}"]
            assert (found["norms"] / expected["norms"] - 1)[0].abs() < 1e-5, key
            assert largest_difference(without_norms(found), without_norms(expected)) < 1e-6, key
    key = "float32/conv4/graph/5-5/adamw"
    found, expected = there[f"{strategy}/{key}"], reference[f"single/{key}"]
    assert largest_difference(without_norms(found), without_norms(expected)) < 1e-6


@pytest.mark.parametrize("strategy", ZERO[2])
def test_zero_on_one_gpu_ends_at_the_parameters_of_one_process(one, strategy):
    same_in_float32(one, one, strategy, () if strategy == FURTHER else NETS, PER_RANK[2])


@pytest.mark.parametrize("strategy", ZERO[2])
def test_zero_on_several_gpus_ends_at_the_parameters_of_one_process(several, one, strategy):
    size, there = several
    if strategy not in ZERO[size]:
        pytest.skip(f"not of the matrix with {size} ranks")
    nets = () if strategy == FURTHER else NETS if size == 2 else ("vit",)
    same_in_float32(there, one, strategy, nets, PER_RANK[size])
