"""Which points of the inner loop are kept changes memory, not one bit of the meta-gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from toy import accuracy, cross_entropy, make_episode, make_net, make_problem, relative_error

from cml_dist.memory.live_bytes import LiveBytes
from cml_dist.meta.gradient import Engine, meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import InnerRule, Method, Term
from cml_dist.methods.inner_optim import Adam
from cml_dist.nets.network import CmlNet
from cml_dist.types import Batch, Episode, Features


class EveryStep(InnerRule):
    """SGD whose query losses after all steps count."""

    def terms(self, meta_step: int, steps: int) -> tuple[Term, ...]:
        return (Term((1 / steps,) * steps),)


SGD = InnerRule(0.4, 0.3)
RUNS = [
    *((SGD, 2, steps) for steps in (1, 2, 3, 7, 50)),
    (Adam(0.08, 0.06), 2, 7),
    (Adam(0.08, 0.06), 1, 7),
    (EveryStep(0.4, 0.3), 2, 7),
]


@pytest.mark.parametrize(("rule", "order", "steps"), RUNS)
@pytest.mark.parametrize("family", ["vector", "map"])
def test_the_gradient_is_the_same_to_the_bit(family, rule, order, steps):
    """Also with the points on another device, and close to that of ``graph``, which keeps all."""
    problem, params = make_problem(make_net(family))
    episode, method = make_episode(family), Method(steps, rule, 0.7, order)
    every = meta_gradient(params, episode, problem, method, Engine("adjoint", trajectory="all"))
    for device in (None, torch.device("cpu")):
        engine = Engine("adjoint", trajectory="sqrt", device=device)
        some = meta_gradient(params, episode, problem, method, engine)
        assert all(torch.equal(some.grads[n], every.grads[n]) for n in params)
        assert all(torch.equal(some.terms[n], every.terms[n]) for n in every.terms)
    graph = meta_gradient(params, episode, problem, method, "graph")
    assert relative_error(every.grads, graph.grads) < 1e-10


class Wide(nn.Module):
    """So many parameters that a handful of examples' activations count for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 256, bias=False)

    def forward(self, x: torch.Tensor) -> Features:
        hidden = torch.tanh(self.layer(x))
        return Features(hidden, hidden)


def peak(steps: int, trajectory: str, rule: InnerRule = SGD) -> float:
    """Peak of a meta-gradient above the meta-parameters, in copies of what adapts; simulated, nothing is computed."""
    net = CmlNet(Wide(), nn.Linear(256, 2, bias=False)).to("meta")
    problem = Problem(net, cross_entropy, accuracy, {})
    params = {n: p.detach() for n, p in net.named_parameters()}
    batch = Batch(torch.empty(2, 256, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))
    with LiveBytes() as live:
        live.standing([*params.values(), batch.inputs, batch.targets])
        meta_gradient(
            params,
            Episode(batch, batch, "train", 0, ways=2),
            problem,
            Method(steps, rule),
            Engine("adjoint", trajectory=trajectory),
        )
    return live.peak / sum(4 * p.numel() for p in params.values())


@pytest.mark.parametrize("steps", [7, 50])
def test_about_two_square_roots_of_the_points_are_alive(steps):
    """Beyond what a single step takes (whose one point, fast_0, is the meta-parameters themselves)."""
    alone = peak(1, "all")
    assert peak(steps, "all") - alone == pytest.approx(steps - 1, abs=0.2)
    assert peak(steps, "sqrt") - alone <= 2 * math.sqrt(steps) + 2


def test_a_state_is_kept_with_its_point():
    """Of Adam a point is three copies."""
    rule = Adam(0.1, 0.1)
    alone, every, some = peak(2, "all", rule), peak(12, "all", rule), peak(12, "sqrt", rule)
    assert every - alone == pytest.approx(3 * 10, abs=0.2)
    assert some - alone <= 3 * 2 * math.sqrt(12)
