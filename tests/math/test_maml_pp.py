"""MAML++ against its equations written out in plain torch, in float64: rates and norms a step, multi-step loss, order.

The network is convolution, batch norm and tanh, written here; learned rates alone, heads and co-learners are in
test_methods.py, engines and micro-batches in test_matrix.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toy import (
    accuracy,
    check_equal,
    check_slopes,
    cross_entropy,
    make_episode,
    make_net,
    partial,
    slopes,
    total_gradient,
)

from cml_dist.meta.gradient import MetaGradient, meta_gradient
from cml_dist.meta.inner import adapt
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.methods.maml_pp import MamlPlusPlus
from cml_dist.nets.heads import CentroidHead
from cml_dist.nets.network import CmlNet
from cml_dist.types import Params

STEPS, GAMMA, EPOCH = 3, 0.7, 10
NORMS = ("body.norm.weight", "body.norm.bias")
ADAPTS = ["body.conv.weight", "body.conv.bias", "head.weight", "head.bias"]
RULE = MamlPlusPlus(0.4, 0.3, steps=STEPS, norms=NORMS, multi_step_loss=15 * EPOCH, multi_step_every=EPOCH)
ENGINES = ["graph", "adjoint"]


def make(head: str = "linear", rule: MamlPlusPlus = RULE) -> tuple[Problem, Params]:
    """What the rule learns is moved off its initial values, so that no two rows are alike."""
    net = make_net("map")
    if head == "centroid":
        net = CmlNet(net.body, CentroidHead(4), net.colearner)
    net.add_rule(rule.init(net.adaptable()), rule.replaces)
    torch.manual_seed(7)
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    params |= {n: p + 0.2 * torch.randn_like(p) for n, p in params.items() if n.startswith("rule.")}
    assert not params.keys() & set(NORMS)
    return Problem(net, cross_entropy, accuracy, dict(net.named_buffers())), params


def maps_of(p: Params, x: Tensor, k: int) -> Tensor:
    """Convolution, batch norm by the statistics at hand with the gains and biases of row ``k``, tanh."""
    maps = F.conv2d(x, p["body.conv.weight"], p["body.conv.bias"], padding=1)
    mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), correction=0, keepdim=True)
    gain, bias = (p[f"rule.norm.body.norm.{kind}"][min(k, STEPS - 1)][:, None, None] for kind in ("weight", "bias"))
    return torch.tanh((maps - mean) / (var + 1e-5).sqrt() * gain + bias)


def loss_of(p: Params, batch, k: int) -> Tensor:
    outputs = maps_of(p, batch.inputs, k).mean((2, 3)) @ p["head.weight"].T + p["head.bias"]
    return cross_entropy(outputs, batch.targets)


def query_loss(p: Params, batch, k: int) -> Tensor:
    """L(f_m) + gamma L(f_c)."""
    outputs = maps_of(p, batch.inputs, k).flatten(1) @ p["colearner.1.weight"].T + p["colearner.1.bias"]
    return loss_of(p, batch, k) + GAMMA * cross_entropy(outputs, batch.targets)


def objective(p: Params, weights: tuple[float, ...], order: int = 2, head: str = "linear") -> Tensor:
    """The sum over steps of w_k (L(f_m; Q) + gamma L(f_c; Q)) after each, by a plain loop."""
    episode, total = make_episode("map", 1), torch.zeros(()).double()
    if head == "centroid":
        features = maps_of(p, episode.support.inputs, 0).mean((2, 3))
        means = torch.stack([features[episode.support.targets == c].mean(0) for c in range(3)])
        p = {**p, "head.weight": 2 * means, "head.bias": -(means**2).sum(1)}
    for k, weight in enumerate(weights):
        g = partial(lambda q, k=k: loss_of(q, episode.support, k), p, ADAPTS, order)
        p = {**p, **{n: p[n] - p[f"rule.lr.{n}"][min(k, STEPS - 1)] * g[n] for n in ADAPTS}}
        total = total + weight * query_loss(p, episode.query, k)
    return total


def ours(engine: str, meta_step: int, head: str = "linear", **method: int) -> MetaGradient:
    problem, params = make(head)
    made = Method(**{"inner_steps": STEPS, "rule": RULE, "gamma": GAMMA, **method})
    return meta_gradient(params, make_episode("map", 1), problem, made, engine, meta_step=meta_step)


EQUAL, LAST, SEVENTH = (1 / 3,) * 3, (0.0, 0.0, 1.0), (8 / 45, 8 / 45, 29 / 45)
"""Weights of epochs 0, 15 and 7 of 15: 1/3 - 7/45 early."""


@pytest.mark.parametrize(("meta_step", "weights"), [(0, EQUAL), (75, SEVENTH), (150, LAST)])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_meta_gradient_equals_the_equation_and_central_differences(engine, meta_step, weights):
    got, (_, params) = ours(engine, meta_step), make()
    value, grads = total_gradient(lambda p: objective(p, weights), params)
    assert got.terms["loss"].item() == pytest.approx(value, rel=1e-13)
    check_equal(got.grads, grads)
    check_slopes(got.grads, slopes(lambda p: objective(p, weights), params))
    assert all(g.any() for row in (got.grads[f"rule.norm.{n}"] for n in NORMS) for g in row)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_that_the_support_set_starts_sees_the_first_row(engine):
    got, (_, params) = ours(engine, 0, "centroid"), make("centroid")
    value, grads = total_gradient(lambda p: objective(p, EQUAL, head="centroid"), params)
    assert got.terms["loss"].item() == pytest.approx(value, rel=1e-13)
    check_equal(got.grads, grads)


@pytest.mark.parametrize(("meta_step", "order"), [(149, 1), (150, 2)])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_order_is_annealed_by_the_number_of_the_meta_step(engine, meta_step, order):
    got, (_, params) = ours(engine, meta_step, first_order_steps=150), make()
    weights = LAST if order == 2 else (1 / 45, 1 / 45, 43 / 45)
    check_equal(got.grads, total_gradient(lambda p: objective(p, weights, order), params)[1])


@pytest.mark.parametrize(
    ("epoch", "early", "last"),
    [(0, 0.2, 0.2), (7, 0.2 - 7 / 75, 0.2 + 28 / 75), (14, 0.2 - 14 / 75, 0.2 + 56 / 75), (15, 0.0, 1.0)],
)
def test_weights_are_the_published_ones_in_each_meta_step_of_an_epoch(epoch, early, last):
    """5 steps, 15 epochs of 500 meta-steps."""
    rule = MamlPlusPlus(0.1, 0.1, multi_step_loss=7500)
    for meta_step in (500 * epoch, 500 * epoch + 499):
        (term,) = rule.terms(meta_step, 5)
        assert term.weights == pytest.approx((early,) * 4 + (last,), abs=1e-15)


def test_early_steps_keep_a_least_weight():
    """0.03 / K, in an epoch whose linear weight would be below it."""
    (term,) = replace(RULE, multi_step_loss=100, multi_step_every=1).terms(99, 5)
    assert term.weights == pytest.approx((0.006,) * 4 + (0.976,), abs=1e-15)


def test_more_steps_at_test_go_on_with_the_last_row():
    problem, params = make()
    got = adapt(params, make_episode("map", 1), problem, Method(STEPS + 2, RULE))
    p, support = params, make_episode("map", 1).support
    for k in range(STEPS + 2):
        g = partial(lambda q, k=k: loss_of(q, support, k), p, ADAPTS)
        p = {**p, **{n: p[n] - p[f"rule.lr.{n}"][min(k, STEPS - 1)] * g[n] for n in ADAPTS}}
    check_equal({n: got[n] for n in ADAPTS}, {n: p[n] for n in ADAPTS})
    assert torch.equal(got[NORMS[0]], params[f"rule.norm.{NORMS[0]}"][-1])
