"""Every family of backbones, timm's and our own, goes through one exact second-order meta-step.

The oracle uses no double backward: central differences of the whole meta-objective, whose inner gradient is an
ordinary first-order one, in float64. A first-order meta-gradient must fail the same comparison.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from cml_dist.config.schema import ModelConfig
from cml_dist.meta.compiled import CHECKED, CompiledGradient, distance
from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.nets.build import build_net
from cml_dist.nets.guard import couples_examples
from cml_dist.types import BODY, COLEARNER, HEAD, Batch, Episode, Params

WAYS, PER_CLASS = 3, 2
GAMMA = 0.7
TOLERANCE = 1e-5
STEPS = (1e-8, 1e-9, 1e-7, 1e-10)
"""Of the differences, relative to the parameters; a step that meets a switching ReLU or max-pool is useless, so the
best of a few counts: none of them can agree with a wrong gradient to 1e-5 by chance."""

MODELS = {
    "conv4": (32, {}),
    "mlp": (12, {}),
    "resnet12": (16, {"widths": (4, 8, 8, 16)}),
    "test_resnet": (48, {}),
    "regnetx_002": (48, {}),
    "test_efficientnet": (48, {}),
    "mobilenetv3_small_050": (48, {}),
    "ghostnet_050": (48, {}),
    "test_convnext": (48, {}),
    "test_nfnet": (48, {}),
    "test_vit": (32, {}),
    "deit_tiny_distilled_patch16_224": (32, {"depth": 2}),
    "swin_tiny_patch4_window7_224": (32, {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}),
    "mixer_s32_224": (64, {"mlp_ratio": (0.5, 0.25)}),
    "xcit_nano_12_p16_224": (32, {"depth": 2}),
    "levit_128s": (48, {}),
    "edgenext_xx_small": (48, {}),
}
"""A small model of each family: an image side in px (MLP: size of a vector), and what makes it smaller still."""


@dataclass
class Case:
    """A stateless network with everything that its meta-objective depends on besides the parameters."""

    net: torch.nn.Module
    params: Params
    buffers: Params
    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    inner_lr: float

    def outputs(self, params: Params, inputs: Tensor, *learners: str) -> tuple[Tensor, ...]:
        return functional_call(self.net, {**params, **self.buffers}, (inputs,), {"learners": learners})


@functools.cache
def _case(name: str) -> Case:
    side, smaller = MODELS[name]
    shape = (side,) if name == "mlp" else (3, side, side)
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *given, **settings: create(*given, **{**settings, **smaller}))
        net = build_net(
            ModelConfig(backbone=name, colearner={"depth": 1, "width": 16}),
            input_shape=shape,
            output_dim=WAYS,
            seed=0,
            colearner=True,
        ).double()
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(WAYS).repeat(PER_CLASS)
    support, query = (
        (torch.randn(len(targets), *shape, generator=generator, dtype=torch.float64), targets) for _ in range(2)
    )
    params = {key: value.detach().clone() for key, value in net.named_parameters()}
    for value in params.values():  # away from zero biases and gains, at which whole terms of the gradient vanish
        value += 0.1 * (value.square().mean().sqrt() + 0.1) * torch.randn(value.shape, generator=generator).double()
    buffers = {key: value.detach().clone() for key, value in net.named_buffers()}
    return Case(copy.deepcopy(net).to("meta"), params, buffers, support, query, inner_lr=0.05)


def meta_gradient_under_test(case: Case, order: int = 2, engine: str = "graph") -> Params:
    """The system under test: the core's own meta-gradient."""
    problem = Problem(case.net, F.cross_entropy, lambda outputs, targets: outputs.new_zeros(()), case.buffers)
    method = Method.sgd(1, case.inner_lr, case.inner_lr, GAMMA, order)
    episode = Episode(Batch(*case.support), Batch(*case.query), "train", 0)
    return meta_gradient(case.params, episode, problem, method, engine).grads


def meta_objective(case: Case, params: Params) -> float:
    """The outer loss after one inner step, by first derivatives alone."""
    leaves = {name: value.detach().requires_grad_(not name.startswith(COLEARNER)) for name, value in params.items()}
    adapted = [name for name, value in leaves.items() if value.requires_grad]
    (logits,) = case.outputs(leaves, case.support[0], "meta")
    grads = torch.autograd.grad(
        F.cross_entropy(logits, case.support[1]), [leaves[name] for name in adapted], allow_unused=True
    )
    with torch.no_grad():
        fast = dict(params)
        for name, grad in zip(adapted, grads, strict=True):
            fast[name] = params[name] if grad is None else params[name] - case.inner_lr * grad
        meta, co = case.outputs(fast, case.query[0], "meta", "co")
        return float(F.cross_entropy(meta, case.query[1]) + GAMMA * F.cross_entropy(co, case.query[1]))


def _direction(case: Case, seed: int, part: str = "") -> Params:
    """A random direction, each tensor in proportion to its own size; zero outside ``part``."""
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, value in case.params.items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        scale = float(value.square().mean().sqrt()) if name.startswith(part) else 0.0
        direction[name] = scale * noise
    return direction


def _slope(grads: Params, direction: Params) -> float:
    return float(sum((grads[name] * direction[name]).sum() for name in direction))


def _errors(case: Case, direction: Params, *candidates: Params) -> list[float]:
    """Relative error of each candidate's slope along a direction; the best step of the first candidate decides."""
    errors = [float("inf")] * len(candidates)
    for step in STEPS:
        ahead, behind = (
            meta_objective(case, {name: value + sign * step * direction[name] for name, value in case.params.items()})
            for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * step)
        now = [abs(_slope(candidate, direction) - slope) / abs(slope) for candidate in candidates]
        if now[0] < errors[0]:
            errors = now
        if errors[0] < TOLERANCE:
            break
    return errors


@pytest.mark.parametrize("name", MODELS)
def test_meta_gradient_matches_finite_differences(name: str) -> None:
    case = _case(name)
    before = {key: value.clone() for key, value in case.buffers.items()}
    exact, first_order = (meta_gradient_under_test(case, order) for order in (2, 1))
    assert all(torch.isfinite(grad).all() for grad in exact.values())
    for name, grad in meta_gradient_under_test(case, engine="adjoint").items():
        assert torch.allclose(grad, exact[name], rtol=1e-10, atol=1e-12), f"the engines differ in {name}"

    first_order_errors = []
    for seed, part in enumerate(["", BODY, HEAD, COLEARNER]):
        error, first_order_error = _errors(case, _direction(case, seed, part), exact, first_order)
        assert error < TOLERANCE, f"direction {seed} in {part or 'all parts'}: off by {error:.1e}"
        first_order_errors.append(first_order_error)
    assert max(first_order_errors[:2]) > 100 * TOLERANCE, "the second-order term is too small to be tested"
    assert all(torch.equal(case.buffers[key], value) for key, value in before.items()), "buffers changed"


@pytest.mark.parametrize("name", MODELS)
def test_couples_examples_says_what_the_network_does(name: str) -> None:
    case = _case(name)
    inputs = case.support[0]
    together = torch.cat(case.outputs(case.params, inputs, "meta", "co"), dim=1)
    apart = torch.cat([torch.cat(case.outputs(case.params, chunk, "meta", "co"), dim=1) for chunk in inputs.split(3)])
    assert couples_examples(case.net) == (not torch.allclose(together, apart, rtol=1e-9, atol=1e-9))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", ["mlp", "conv4", "test_vit"])
def test_compiled_is_eager(name: str, steps: int) -> None:
    case, compute = _case(name), CompiledGradient()
    problem = Problem(case.net, F.cross_entropy, lambda outputs, targets: outputs.new_zeros(()), case.buffers)
    method = Method.sgd(steps, 0.01, 0.01, GAMMA)
    for index in range(CHECKED + 1):
        support, query = ((inputs.roll(index, -1), targets) for inputs, targets in (case.support, case.query))
        episode = Episode(Batch(*support), Batch(*query), "train", index)
        found, eager = (how(case.params, episode, problem, method, "graph") for how in (compute, meta_gradient))
        assert distance(found.grads, eager.grads) < 1e-10
    assert [graph.run is not None for graph in compute.graphs.values()] == [True]
