"""Unlabelled examples: their labels and the meta-gradient through them, against plain autograd written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_matrix import ALL, GRAPH, RULES, SQRT, make
from torch import Tensor
from toy import (
    accuracy,
    check_equal,
    check_slopes,
    colearner_of,
    cross_entropy,
    logits_of,
    make_episode,
    make_net,
    make_problem,
    partial,
    slopes,
    total_gradient,
    uneven_episode,
)

from cml_dist.meta.gradient import Engine, MetaGradient, meta_gradient
from cml_dist.meta.inner import adapt
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.meta.unlabelled import Unlabelled, soft_labels
from cml_dist.types import Batch, Episode, Params

RATES, GAMMA, RULE = {"body": 0.4, "head": 0.3}, 0.7, InnerRule(0.4, 0.3)
REFINED = Unlabelled(steps=2, weight=1.5, temperature=0.6, refinement=3.0)
HOWS = {
    "refined": REFINED,
    "own labels refined": replace(REFINED, steps=1, temperature=1.0),
    "soft labels": replace(REFINED, refinement=0.0),
}


def with_unlabelled(episode: Episode, count: int = 7) -> Episode:
    inputs = torch.randn(count, *episode.support.inputs.shape[1:], generator=torch.Generator().manual_seed(7)).double()
    return replace(episode, unlabelled=Batch(inputs, torch.full((count,), -1)))


def rates(names) -> dict[str, float]:
    return {n: RATES[n.partition(".")[0]] for n in names if n.partition(".")[0] in RATES}


def consistency(p: Params, x: Tensor, labels: Tensor) -> Tensor:
    return ((logits_of(p, x).softmax(1) - labels) ** 2).sum() / len(x)


def refined(p: Params, how: Unlabelled, labelled: Callable[[Params], Tensor], x: Tensor, order: int) -> Tensor:
    """The labels by the paper's definition: the derivative, by them, of the labelled loss after the virtual step."""
    labels = (logits_of(p, x) / how.temperature).softmax(1)

    def after(y: Tensor) -> Tensor:
        step = partial(lambda q: consistency(q, x, y), p, rates(p))
        return labelled({**p, **{n: p[n] - rate * step[n] for n, rate in rates(p).items()}})

    kept = (labels - how.refinement * len(x) * torch.func.grad(after)(labels)).clamp_min(0)
    found = kept / kept.sum(1, keepdim=True)
    return found.detach() if order == 1 else found


def objective(params: Params, episode: Episode, how: Unlabelled, steps: int, order: int = 2) -> Tensor:
    """The whole method on :class:`toy.Vector` as one expression."""

    def labelled(p: Params) -> Tensor:
        return cross_entropy(logits_of(p, episode.support.inputs), episode.support.targets)

    def moved(p: Params, loss: Callable[[Params], Tensor]) -> Params:
        grads = partial(loss, p, rates(p), order)
        return {**p, **{n: p[n] - rate * grads[n] for n, rate in rates(p).items()}}

    fast, x = dict(params), episode.unlabelled.inputs
    for _ in range(steps):
        fast = moved(fast, labelled)
    labels = refined(fast, how, labelled, x, order)
    for _ in range(how.steps):
        fast = moved(fast, lambda p: labelled(p) + how.weight * consistency(p, x, labels))
    query = episode.query
    outer = cross_entropy(logits_of(fast, query.inputs), query.targets)
    return outer + GAMMA * cross_entropy(colearner_of(fast, query.inputs), query.targets)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("engine", [GRAPH, ALL, SQRT], ids=["graph", "adjoint", "sqrt"])
def test_the_meta_gradient_is_that_of_the_method_written_out(how, steps, order, engine):
    net, episode = make_net("vector"), with_unlabelled(make_episode("vector"))
    problem, params = make_problem(net)
    value, expected = total_gradient(lambda p: objective(p, episode, how, steps, order), params)
    found = meta_gradient(params, episode, problem, Method(steps, RULE, GAMMA, order, unlabelled=how), engine)
    check_equal(found.grads, expected, rel=1e-10)
    assert found.terms["loss"].item() == pytest.approx(value, rel=1e-12)


def test_the_refinement_is_the_second_derivative_written_out_and_lowers_the_labelled_loss():
    """d L(theta') / d y by autograd through the virtual step, and 2 alpha / U J_p grad L(theta') by its Jacobian."""
    torch.manual_seed(0)
    weights, x, s = (torch.randn(*shape).double() for shape in ((4, 3), (6, 4), (5, 4)))
    targets, alpha, how = torch.tensor([0, 1, 2, 0, 1]), 0.3, Unlabelled(1, temperature=0.5, refinement=0.2)
    here = weights.clone().requires_grad_()

    def gradient(at: Params) -> Params:
        (found,) = torch.autograd.grad(cross_entropy(s @ at["w"], targets), [at["w"]], create_graph=True)
        return {"w": found}

    found = soft_labels(how, lambda inputs: x @ inputs[0], [here], {"w": alpha}, [0], gradient).detach()

    labels = (x @ weights / 0.5).softmax(1).requires_grad_()
    (slope,) = torch.autograd.grad(((x @ here).softmax(1) - labels).square().sum() / 6, here, create_graph=True)
    after = here - alpha * slope
    (by_labels,) = torch.autograd.grad(cross_entropy(s @ after, targets), labels)
    expected = labels.detach() - 0.2 * 6 * by_labels
    assert expected.min() > 0  # or it would be cut off
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)

    down = gradient({"w": after.detach().requires_grad_()})["w"].detach()
    jacobian = torch.func.jacrev(lambda w: (x @ w).softmax(1))(weights)
    along = torch.einsum("ucij,ij->uc", jacobian, down)
    torch.testing.assert_close(by_labels, 2 * alpha / 6 * along, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("family", ["map", "attention"])
def test_central_differences_agree(family):
    net, episode = make_net(family), with_unlabelled(make_episode(family))
    problem, params = make_problem(net)
    method = Method(1, RULE, GAMMA, unlabelled=REFINED)

    def loss(p: Params) -> Tensor:
        return meta_gradient(p, episode, problem, method, "adjoint").terms["loss"]

    found = meta_gradient(params, episode, problem, method, "adjoint")
    check_slopes(found.grads, slopes(loss, params))
    check_equal(meta_gradient(params, episode, problem, method, "graph").grads, found.grads, rel=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("engine", "size"), [(ALL, None), (SQRT, 2), (GRAPH, 3)])
def test_every_rule_has_one_meta_gradient_in_any_pieces(rule, engine, size):
    def gradient(engine: Engine, size: int | None) -> MetaGradient:
        net = make("dense", RULES[rule])
        params = {n: p.detach() for n, p in net.named_parameters()}
        problem = Problem(net, cross_entropy, accuracy, {}, micro_batch=size)
        method = Method(2, RULES[rule], GAMMA, unlabelled=REFINED)
        return meta_gradient(params, with_unlabelled(uneven_episode()), problem, method, engine)

    expected = gradient(GRAPH, None)
    check_equal(gradient(engine, size).grads, expected.grads, rel=1e-10)
    assert any(g.any() for g in expected.grads.values())


@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_without_unlabelled_examples_it_is_maml_to_the_bit(engine):
    net, episode = make_net("vector"), make_episode("vector")
    problem, params = make_problem(net)
    plain, with_it = (Method(3, RULE, GAMMA, unlabelled=how) for how in (None, REFINED))
    ours, theirs = (meta_gradient(params, episode, problem, method, engine) for method in (with_it, plain))
    assert all(torch.equal(ours.grads[n], g) for n, g in theirs.grads.items())
    unread = meta_gradient(params, with_unlabelled(episode), problem, plain, engine)
    assert all(torch.equal(unread.grads[n], g) for n, g in theirs.grads.items())


@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_own_labels_say_nothing_in_the_first_step(engine):
    net, episode = make_net("vector"), with_unlabelled(make_episode("vector"))
    problem, params = make_problem(net)
    own = Method(2, RULE, GAMMA, unlabelled=Unlabelled(steps=1))
    ours, theirs = (meta_gradient(params, episode, problem, method, engine) for method in (own, Method(3, RULE, GAMMA)))
    check_equal(ours.grads, theirs.grads, rel=1e-10)


def test_a_test_adapts_as_training_does():
    net, episode = make_net("vector"), with_unlabelled(make_episode("vector"))
    problem, params = make_problem(net)
    method = Method(2, RULE, GAMMA, unlabelled=REFINED)
    adapted = adapt(params, episode, problem, method)
    (outputs,) = problem.answers(adapted, episode, ["meta"])
    told = meta_gradient(params, episode, problem, method, "graph").terms["outer_loss"]
    assert cross_entropy(outputs, episode.query.targets).item() == pytest.approx(told.item(), rel=1e-12)
