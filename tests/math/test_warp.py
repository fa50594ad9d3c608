"""WarpGrad and T-Net in float64: the preconditioned step in closed form, and the two objectives of warp layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from toy import (
    accuracy,
    check_equal,
    check_slopes,
    cross_entropy,
    make_net,
    make_problem,
    partial,
    slopes,
    total_gradient,
    uneven_episode,
)

from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.inner import adapt
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.methods.warpgrad import WarpGrad, is_warp
from cml_dist.nets.network import CmlNet
from cml_dist.nets.warp import add_warps, warped
from cml_dist.types import Batch, Episode, Features, Params

RATE, HEAD_RATE, GAMMA, STEPS = 0.4, 0.3, 0.7, 3
NET, EPISODE = make_net("warped"), uneven_episode()
WARPS = [n for n, _ in NET.named_parameters() if is_warp(n)]
ADAPTS = frozenset(n for n, _ in NET.named_parameters() if n not in WARPS and not n.startswith("colearner."))
ENGINES = ("graph", "adjoint")


def loss(p: Params, batch: Batch, learner: str = "meta") -> Tensor:
    (outputs,) = functional_call(NET, p, (batch.inputs, (learner,)))
    return cross_entropy(outputs, batch.targets)


def step(p: Params, order: int = 2) -> Params:
    g = partial(lambda q: loss(q, EPISODE.support), p, ADAPTS, order)
    return {**p, **{n: p[n] - (HEAD_RATE if n.startswith("head.") else RATE) * g[n] for n in ADAPTS}}


def outer(p: Params) -> Tensor:
    return loss(p, EPISODE.query) + GAMMA * loss(p, EPISODE.query, "co")


def after_all_steps(p: Params, order: int = 2) -> Tensor:
    for _ in range(STEPS):
        p = step(p, order)
    return outer(p)


def ours(rule: InnerRule, engine: str, size: int | None, order: int = 2) -> tuple[float, Params]:
    problem, params = make_problem(NET)
    problem.micro_batch = size
    got = meta_gradient(params, EPISODE, problem, Method(STEPS, rule, GAMMA, order), engine)
    return got.terms["loss"].item(), got.grads


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_warp_layers_learn_by_one_step_from_points_held_constant(engine, size):
    """By central differences: the points are visited once, then the warp layers alone move. The rest learns as MAML."""
    value, grads = ours(WarpGrad(RATE, HEAD_RATE, ADAPTS), engine, size)
    _, params = make_problem(NET)
    visited, at = [], params
    for _ in range(STEPS):
        visited.append({n: at[n] for n in ADAPTS})
        at = step(at)

    def of_warps(moved: Params) -> Tensor:
        return sum(outer(step({**params, **moved, **point})) for point in visited)

    warps = {n: params[n] for n in WARPS}
    check_slopes(grads, slopes(of_warps, warps))
    check_equal({n: grads[n] for n in WARPS}, total_gradient(of_warps, warps)[1])
    assert value == pytest.approx((of_warps(warps) + after_all_steps(params)).item(), rel=1e-13)
    rest = {n: p for n, p in params.items() if n not in WARPS}
    by_maml = total_gradient(lambda p: after_all_steps({**params, **p}), rest)[1]
    check_equal({n: grads[n] for n in rest}, by_maml)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_tnet_learns_through_the_whole_loop(engine, order):
    value, grads = ours(InnerRule(RATE, HEAD_RATE, ADAPTS), engine, None, order)
    expected, by_loop = total_gradient(lambda p: after_all_steps(p, order), make_problem(NET)[1])
    assert value == pytest.approx(expected, rel=1e-13)
    check_equal(grads, by_loop)
    assert all(by_loop[n].norm() > 1e-3 for n in WARPS)


def test_the_cosine_is_of_what_the_first_term_trains():
    """Warp layers have another objective, of which the co-learner's share is not told apart."""
    problem, params = make_problem(NET)
    method = Method(STEPS, WarpGrad(RATE, HEAD_RATE, ADAPTS), GAMMA)
    got = meta_gradient(params, EPISODE, problem, method, "adjoint", diagnose=True).terms["gradient_cosine"]
    body = [n for n in ADAPTS if n.startswith("body.")]

    def gradient(gamma: float, meta: float) -> Tensor:
        def objective(p: Params) -> Tensor:
            q = {**params, **p}
            for _ in range(STEPS):
                q = step(q)
            return meta * loss(q, EPISODE.query) + gamma * loss(q, EPISODE.query, "co")

        return torch.cat([g.flatten() for g in total_gradient(objective, {n: params[n] for n in body})[1].values()])

    expected = torch.cosine_similarity(gradient(0.0, 1.0), gradient(1.0, 0.0), dim=0)
    assert got.item() == pytest.approx(expected.item(), rel=1e-10)


class Linear(nn.Module):
    """omega W x."""

    tap_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4, bias=False)

    def warp_places(self) -> list[tuple[nn.Module, int]]:
        return [(self.layer, 4)]

    def forward(self, x: Tensor) -> Features:
        out = warped(self.layer, self.layer(x))
        return Features(out, out)


@pytest.mark.parametrize("residual", [False, True])
def test_the_step_of_a_linear_model_is_preconditioned_by_the_warp(residual):
    """With M = omega W the product that the network is, a step of W moves M by -rate omega omega^T dL/dM."""
    torch.manual_seed(2)
    body, count = Linear(), 7
    add_warps(body, "linear", "conv", residual)  # on vectors a matrix too
    net = CmlNet(body, nn.Identity()).double()
    w, v = body.layer.weight.detach(), body.layer.warp.weight.data
    x, y = torch.randn(count, 3).double(), torch.randn(count, 4).double()
    assert torch.equal(net(x)[0], x @ w.T)  # the identity at the start
    v += 0.3 * torch.randn_like(v)
    omega = v + residual * torch.eye(4)
    batch = Batch(x, y)
    params = {n: p.detach() for n, p in net.named_parameters()}
    problem = Problem(net, nn.functional.mse_loss, accuracy, {})
    method = Method(1, WarpGrad(RATE, 0.0, frozenset(["body.layer.weight"])))
    got = adapt(params, Episode(batch, batch, "test", 0), problem, method)
    slope = 2 / (4 * count) * (x @ (omega @ w).T - y).T @ x
    torch.testing.assert_close(
        omega @ got["body.layer.weight"], omega @ w - RATE * omega @ omega.T @ slope, rtol=1e-12, atol=1e-13
    )
    assert torch.equal(got["body.layer.warp.weight"], v)
