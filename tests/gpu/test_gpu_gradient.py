"""The meta-gradient on a GPU is that of the CPU, by every engine and with every means of saving memory."""

from __future__ import annotations

import pytest
import torch
from parity_worker import NETS, WAYS, RandomImages
from plan import gpu_arithmetic

from cml_dist.meta.gradient import Engine
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import Method
from cml_dist.nets.build import build_net

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

METHOD = Method.sgd(2, 0.1, 0.2, gamma=0.7)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("arithmetic")

def gradient(device: torch.device, name: str, engine: str, dtype: torch.dtype = torch.float64, **options):
    """The meta-gradient of one episode, flat, in float64 on the CPU."""
    config, shape = NETS[name]
    domain = RandomImages(shape)
    net = build_net(config, input_shape=shape, output_dim=WAYS, seed=0, colearner=True).to(dtype)
    model = MetaModel(net, domain.loss, domain.score, METHOD, engine, **options).to(device)
    episode = domain.prepare(domain.episode("train", 0), device, dtype)
    model([episode], 1.0)[0].backward()
    assert all(p.grad.dtype == dtype and p.grad.device.type == device.type for p in model.values)
    return torch.cat([p.grad.flatten() for p in model.values]).to(CPU, torch.float64)


def distance(one, two) -> float:
    return ((one - two).norm() / two.norm()).item()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_float64_is_that_of_the_cpu(gpu, name, engine):
    assert distance(gradient(gpu, name, engine), gradient(CPU, name, "graph")) < 1e-10


@pytest.mark.parametrize("name", NETS)
def test_copies_on_the_cpu_change_no_bit(gpu, name):
    away = gradient(gpu, name, Engine("adjoint", device=CPU))
    assert torch.equal(away, gradient(gpu, name, "adjoint"))


@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_micro_batches_are_the_same_gradient(gpu, engine):
    assert distance(gradient(gpu, "vit", engine, micro_batch=2), gradient(CPU, "vit", "graph")) < 1e-10


@pytest.mark.parametrize("name", NETS)
def test_the_same_step_gives_the_same_bits(gpu, name):
    """Without a warning of kernels that could not be deterministic: warnings are errors here."""
    once, again = (gradient(gpu, name, "adjoint", torch.float32) for _ in range(2))
    assert torch.equal(once, again)


def test_float32_is_float32_and_not_tensor_cores_tf32(gpu, monkeypatch):
    """On the smooth network, where rounding switches no ReLU."""
    exact = gradient(CPU, "vit", "graph")
    ours = distance(gradient(gpu, "vit", "adjoint", torch.float32), exact)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    tf32 = distance(gradient(gpu, "vit", "adjoint", torch.float32), exact)
    print(f"float32 {ours:.1e}, TF32 {tf32:.1e}")
    assert ours < 1e-5
    if torch.cuda.get_device_capability(gpu) >= (8, 0):
        assert tf32 > 10 * ours


def test_tf32_is_taken_for_products_and_convolutions_where_it_is_asked_for_alone(gpu):
    """On the smooth network, and for a convolution of Conv-4's size: for small ones there may be no such kernel."""
    if torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("this GPU has no TF32")
    generator = torch.Generator().manual_seed(0)
    shapes = (75, 64, 42, 42), (64, 64, 3, 3)
    images, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).to(gpu) for shape in shapes)
    exact = {"gradient": gradient(CPU, "vit", "graph"), "convolution": torch.conv2d(images, weight)}
    found = {}
    try:
        for precision in ("tf32", "fp32"):
            gpu_arithmetic(precision)
            ours = {"gradient": gradient(gpu, "vit", "adjoint", torch.float32)}
            ours["convolution"] = torch.conv2d(images.float(), weight.float()).double()
            found[precision] = {what: distance(value, exact[what]) for what, value in ours.items()}
    finally:
        gpu_arithmetic()
    print(found)
    for what in exact:
        assert found["fp32"][what] < 1e-5 and 1e-4 < found["tf32"][what] < 0.05, what


@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_bfloat16_arithmetic_is_float32_to_its_own_precision(gpu, engine):
    full = gradient(gpu, "vit", engine, torch.float32)
    half = gradient(gpu, "vit", engine, torch.float32, autocast=torch.bfloat16)
    assert 1e-5 < distance(half, full) < 0.05
