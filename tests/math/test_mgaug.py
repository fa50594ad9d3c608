"""MGAug against its sum written out in plain torch, in float64: J(p) + weight * sum of J(p * mask), each J a loop.

There the masks are put on parameters before the loop and on the gradients inside; the package masks what is seen.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial as bind

import pytest
import torch
from torch import Tensor
from toy import (
    accuracy,
    check_equal,
    check_slopes,
    colearner_of,
    cross_entropy,
    features_of,
    logits_of,
    make_net,
    partial,
    slopes,
    total_gradient,
    uneven_episode,
)

from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.methods.meta_sgd import MetaSgd
from cml_dist.methods.mgaug import Pruning
from cml_dist.nets.heads import build_head
from cml_dist.types import Episode, Params

RATE, HEAD_RATE, GAMMA, STEPS, WEIGHT = 0.4, 0.3, 0.7, 2, 0.6
LAYERS = ("body.layers.0", "body.layers.2")
CHANNELS = tuple((f"{layer}.weight", f"{layer}.bias") for layer in LAYERS)
ALONE = tuple((f"{layer}.weight",) for layer in LAYERS)
PRUNINGS = {
    "width": Pruning("width", (0.2, 0.5), CHANNELS, 3, WEIGHT),
    "parameters": Pruning("parameters", (0.2, 0.5), ALONE, 3, WEIGHT),
    "catfish": Pruning("catfish", (0.1, 0.4), ALONE, 3, WEIGHT),
    "catfish over all": Pruning("catfish", (0.1, 0.4), ALONE, 3, WEIGHT, "network"),
}
ADAPTS = [f"{layer}.{kind}" for layer in (*LAYERS, "head") for kind in ("weight", "bias")]


def loss_at(p: Params, episode: Episode) -> Tensor:
    return cross_entropy(logits_of(p, episode.support.inputs), episode.support.targets)


def started(q: Params, episode: Episode, head: str) -> Params:
    if head == "linear":
        return q
    found, labels = features_of(q, episode.support.inputs), episode.support.targets
    means = torch.stack([found[labels == c].mean(0) for c in range(episode.ways)])
    return {**q, "head.weight": 2 * means, "head.bias": -(means**2).sum(1)}


def objective(p: Params, episode: Episode, masks: Params, head: str, order: int) -> Tensor:
    """Eq. 6 after the inner loop of the sub-network."""
    x, y = episode.query.inputs, episode.query.targets
    rates = {n: p.get(f"rule.lr.{n}", HEAD_RATE if n.startswith("head.") else RATE) for n in ADAPTS}
    q = started({n: v * masks.get(n, 1.0) for n, v in p.items()}, episode, head)
    for _ in range(STEPS):
        g = partial(bind(loss_at, episode=episode), q, ADAPTS, order)
        q = {**q, **{n: q[n] - rates[n] * masks.get(n, 1.0) * g[n] for n in ADAPTS}}
    return cross_entropy(logits_of(q, x), y) + GAMMA * cross_entropy(colearner_of(q, x), y)


def masks_by_hand(kind: str, p: Params, episode: Episode, head: str) -> list[Params]:
    """Of random prunings those that were drawn; of catfish the largest scores, by sorting."""
    if not kind.startswith("catfish"):
        return list(PRUNINGS[kind].masks(p, dict, episode))
    slopes_at = partial(bind(loss_at, episode=episode), started(p, episode, head), [n for (n,) in ALONE])
    found = []
    for ratio in PRUNINGS[kind].ratios:
        scores = {n: (g * p[n]).abs() for n, g in slopes_at.items()}
        compared = {n: s.flatten() for n, s in scores.items()}
        if kind == "catfish over all":
            compared = dict.fromkeys(scores, torch.cat([*compared.values()]))
        least = {n: s.sort(descending=True).values[round(ratio * len(s))] for n, s in compared.items()}
        found.append({n: (s <= least[n]).double() for n, s in scores.items()})
    return found


@pytest.fixture(scope="module", params=["sgd", "meta_sgd", "centroid"])
def made(request):
    """(kind of head, rule, problem, meta-parameters, episode)."""
    rule = (MetaSgd if request.param == "meta_sgd" else InnerRule)(RATE, HEAD_RATE)
    net, head = make_net("vector"), "centroid" if request.param == "centroid" else "linear"
    if head == "centroid":
        net.head = build_head(head, 6, 3).double()
    net.add_rule(rule.init(net.adaptable()))
    params = {n: p.detach() for n, p in net.named_parameters()}
    return head, rule, Problem(net, cross_entropy, accuracy, {}), params, uneven_episode()


@pytest.mark.parametrize("kind", PRUNINGS)
@pytest.mark.parametrize("order", [1, 2])
def test_the_meta_gradient_is_the_sum_over_sub_networks(made, kind, order):
    """Both engines, the sets whole and in micro-batches."""
    head, rule, problem, params, episode = made
    masks = [{}, *masks_by_hand(kind, params, episode, head)]
    assert all(0 < (m == 0).sum() < m.numel() for of_one in masks for m in of_one.values())

    def total(p: Params) -> Tensor:
        terms = [objective(p, episode, of_one, head, order) for of_one in masks]
        return terms[0] + WEIGHT * sum(terms[1:])

    value, grads = total_gradient(total, params)
    method = Method(STEPS, rule, GAMMA, order, augment=PRUNINGS[kind])
    for engine, size in (("graph", None), ("adjoint", None), ("adjoint", 2)):
        problem.micro_batch = size
        got = meta_gradient(params, episode, problem, method, engine)
        assert got.terms["loss"].item() == pytest.approx(value, rel=1e-13)
        check_equal(got.grads, grads)
        alone = meta_gradient(params, episode, problem, replace(method, augment=None), engine)
        assert got.terms["score"] == alone.terms["score"] and got.terms["outer_loss"] == alone.terms["outer_loss"]
    if order == 2 and not kind.startswith("catfish"):  # its masks jump with the parameters, and are constants here
        check_slopes(got.grads, slopes(total, params))


def test_masks_are_a_function_of_seed_split_index_and_number():
    params = {n: p.detach() for n, p in make_net("vector").named_parameters()}
    episode = uneven_episode()
    for pruning in (PRUNINGS["width"], PRUNINGS["parameters"]):
        pruning = replace(pruning, ratios=(0.3, 0.3))

        def drawn(pruning: Pruning = pruning, **how: object) -> Tensor:
            found = pruning.masks(params, dict, replace(episode, **how))
            return torch.stack([torch.cat([m.flatten() for m in one.values()]) for one in found])

        here = drawn()
        assert torch.equal(here, drawn()) and not torch.equal(*here)
        others = [drawn(index=1), drawn(split="val"), drawn(replace(pruning, seed=4))]
        assert all(not torch.equal(here, other) for other in others)
