"""The meta-gradient against closed forms, finite differences and an independent implementation, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import (
    BODIES,
    accuracy,
    cross_entropy,
    make_episode,
    make_net,
    make_problem,
    plain_gradient,
    plain_losses,
    plain_objective,
    relative_error,
    total_gradient,
)

from cml_dist.meta.gradient import learners_gradients, meta_gradient
from cml_dist.meta.model import MetaModel
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.nets.network import CmlNet
from cml_dist.run.evaluator import score_episode
from cml_dist.types import Batch, Episode, Features, Params

METHODS = {
    "cml": Method.sgd(1, 0.4, 0.4, gamma=0.7),
    "maml": Method.sgd(1, 0.4, 0.4, gamma=0.0),
    "first_order": Method.sgd(1, 0.4, 0.4, gamma=0.7, order=1),
    "head_only": Method.sgd(1, 0.0, 0.4, gamma=0.7),
    "body_only": Method.sgd(1, 0.4, 0.0, gamma=0.7),
}


@pytest.mark.parametrize("family", BODIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_engines_equal_an_independent_implementation(family, method, steps, engine):
    net = make_net(family)
    problem, params = make_problem(net)
    episode, numbers = make_episode(family), replace(METHODS[method], inner_steps=steps)
    ours = meta_gradient(params, episode, problem, numbers, engine)
    assert relative_error(ours.grads, plain_gradient(net, params, episode, numbers)) < 1e-12


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_each_learners_own_gradient_is_that_of_its_query_loss(order, engine):
    net = make_net("map")
    problem, params = make_problem(net)
    episode, method = make_episode("map"), Method.sgd(3, 0.4, 0.3, gamma=0.7, order=order)
    ours = learners_gradients(params, episode, problem, method, engine, ("meta", "co"))
    for number, learner in enumerate(("meta", "co")):
        _, theirs = total_gradient(lambda p, n=number: plain_losses(net, p, episode, method)[n], params)
        reached = {n: g for n, g in theirs.items() if n in ours[learner]}
        assert all(g.abs().max() == 0 for n, g in theirs.items() if n not in reached)
        assert relative_error(ours[learner], reached) < 1e-12


@pytest.mark.parametrize("family", BODIES)
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_finite_differences(family, engine):
    """Along random directions in psi, theta and phi together, and in each alone."""
    net = make_net(family)
    problem, params = make_problem(net)
    episode, method = make_episode(family), Method.sgd(3, 0.4, 0.3, gamma=0.7)
    grads = meta_gradient(params, episode, problem, method, engine).grads
    torch.manual_seed(1)
    eps = 1e-5
    for part in ("", "body.", "head.", "colearner."):
        direction = {n: torch.randn_like(p) if n.startswith(part) else torch.zeros_like(p) for n, p in params.items()}

        def at(step, direction=direction):
            shifted = {n: (p + step * direction[n]).requires_grad_() for n, p in params.items()}
            return plain_objective(net, shifted, episode, method).item()

        slope = (at(eps) - at(-eps)) / (2 * eps)
        ours = sum((grads[n] * direction[n]).sum() for n in params).item()
        assert ours == pytest.approx(slope, rel=1e-6, abs=1e-9), part or "all"


class _Quadratic(nn.Module):
    """A body whose output is its parameter: losses on it are quadratics with a known Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, inputs):
        w = self.w.expand(len(inputs), -1)
        return Features(w, w)


@pytest.mark.parametrize("engine", ["graph", "adjoint"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_closed_form_on_a_quadratic(engine, steps):
    """L(w; t) = 0.5 w'Hw - t'w: w' = w - a(Hw - t), so the meta-gradient is (I - aH)^K (H w_K - t_Q) + phi's."""
    hessian = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
    support, query = (torch.tensor([v], dtype=torch.float64) for v in ([0.2, 1.0, -1.0], [1.0, 0.0, 2.0]))

    class Scale(nn.Module):
        """The co-learner phi * w, a second head on the adapted body."""

        def __init__(self) -> None:
            super().__init__()
            self.phi = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, tap):
            return self.phi * tap

    def loss(outputs, targets):
        w = outputs[0]
        return 0.5 * w @ hessian @ w - targets[0] @ w

    net = CmlNet(_Quadratic(), nn.Identity(), Scale())
    problem = Problem(net, loss, lambda o, t: loss(o, t).detach(), {})
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    episode = Episode(Batch(support, support), Batch(query, query), "train", 0)
    alpha, gamma = 0.3, 0.6
    got = meta_gradient(params, episode, problem, Method.sgd(steps, alpha, alpha, gamma), engine)

    w, phi = params["body.w"], params["colearner.phi"]
    for _ in range(steps):
        w = w - alpha * (hessian @ w - support[0])
    outer = (hessian @ w - query[0]) + gamma * phi * (phi * hessian @ w - query[0])
    shrink = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - alpha * hessian, steps)
    assert torch.allclose(got.grads["body.w"], shrink @ outer, rtol=1e-13, atol=1e-14)
    by_phi = gamma * (phi * w @ hessian @ w - query[0] @ w)
    assert torch.allclose(got.grads["colearner.phi"], by_phi, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("family", BODIES)
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_gamma_zero_is_maml_to_the_bit(family, engine):
    episode = make_episode(family)
    with_co, maml = make_net(family), make_net(family, colearner=False)
    method = Method.sgd(3, 0.4, 0.4, gamma=0.0)
    problem, params = make_problem(with_co)
    cml = meta_gradient(params, episode, problem, method, engine, diagnose=True)
    problem, params = make_problem(maml)
    alone = meta_gradient(params, episode, problem, method, engine)
    for name, grad in alone.grads.items():
        assert torch.equal(cml.grads[name], grad), name
    assert torch.equal(cml.terms["outer_loss"], alone.terms["outer_loss"])
    for name in set(cml.grads) - set(alone.grads):
        assert not cml.grads[name].any(), name


def test_first_order_differs_from_second_order():
    """The oracle can tell them apart; if this fails, the second-order tests above prove nothing."""
    net = make_net("map")
    problem, params = make_problem(net)
    episode = make_episode("map")
    first = meta_gradient(params, episode, problem, Method.sgd(3, 0.4, 0.4, 0.7, order=1), "graph").grads
    second = meta_gradient(params, episode, problem, Method.sgd(3, 0.4, 0.4, 0.7, order=2), "graph").grads
    assert relative_error(first, second) > 1e-2


def separate_cosine(net: CmlNet, params: Params, episode: Episode, method: Method) -> float:
    """Cosine in the body of two meta-gradients, each through the whole unrolled inner loop: of the meta-learner's
    query loss alone (gamma = 0), and of the co-learner's alone."""
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    body = [p for n, p in leaves.items() if n.startswith("body.")]
    of_meta, of_co = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, body, retain_graph=True)])
        for loss in plain_losses(net, leaves, episode, method)
    )
    return (of_meta @ of_co / (of_meta.norm() * of_co.norm())).item()


DIAGNOSED = {
    "maml": Method.sgd(2, 0.4, 0.4, gamma=0.7),
    "boil": Method.sgd(2, 0.4, 0.0, gamma=0.7),
    "first_order": Method.sgd(2, 0.4, 0.4, gamma=0.7, order=1),
    "gamma_zero": Method.sgd(2, 0.4, 0.4, gamma=0.0),
}


@pytest.mark.parametrize("method", DIAGNOSED)
@pytest.mark.parametrize("family", ["vector", "map"])
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_diagnosis_changes_no_bit_and_is_the_cosine(engine, family, method):
    net = make_net(family)
    problem, params = make_problem(net)
    episode, numbers = make_episode(family), DIAGNOSED[method]
    plain = meta_gradient(params, episode, problem, numbers, engine)
    told = meta_gradient(params, episode, problem, numbers, engine, diagnose=True)
    assert all(torch.equal(plain.grads[n], told.grads[n]) for n in params)
    assert "gradient_cosine" not in plain.terms
    assert all(torch.equal(plain.terms[n], told.terms[n]) for n in plain.terms)
    expected = separate_cosine(net, params, episode, numbers)
    assert told.terms["gradient_cosine"].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("method", ["maml", "boil"])
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_the_model_averages_the_cosine_over_episodes(engine, method):
    net = make_net("vector")
    _, params = make_problem(net)
    episodes, numbers = [make_episode("vector", index) for index in range(3)], DIAGNOSED[method]
    model = MetaModel(net, cross_entropy, accuracy, numbers, engine)
    loss, sums = model(iter(episodes), 1 / 3, diagnose=frozenset(e.index for e in episodes))
    loss.backward()
    total, count = sums["gradient_cosine"].tolist()
    assert count == 3
    each = [separate_cosine(net, params, episode, numbers) for episode in episodes]
    assert total / count == pytest.approx(sum(each) / 3, abs=1e-10)

    other = MetaModel(net, cross_entropy, accuracy, numbers, engine)
    plain, without = other(iter(episodes), 1 / 3)
    plain.backward()
    assert "gradient_cosine" not in without
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.values, other.values, strict=True))


@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_model_delivers_the_mean_over_episodes(engine):
    net = make_net("map")
    _, params = make_problem(net)
    method = Method.sgd(2, 0.4, 0.3, gamma=0.7)
    episodes = [make_episode("map", index) for index in range(3)]
    model = MetaModel(net, cross_entropy, accuracy, method, engine)
    loss, sums = model(iter(episodes), 1 / 3)
    loss.backward()
    each = [plain_gradient(net, params, episode, method) for episode in episodes]
    mean = {n: sum(g[n] for g in each) / 3 for n in params}
    delivered = dict(zip(model.names, (p.grad for p in model.values), strict=True))
    assert relative_error(delivered, mean) < 1e-12
    losses = [
        plain_objective(net, {n: p.clone().requires_grad_() for n, p in params.items()}, e, method) for e in episodes
    ]
    assert loss.item() == pytest.approx(sum(x.item() for x in losses) / 3, rel=1e-12)
    assert sums["outer_loss"][1] == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_clamp_leaves_what_is_not_finite(bad):
    """Or a step that is to be skipped would be taken. All else is at most what was asked for."""
    model = MetaModel(make_net("vector"), cross_entropy, accuracy, METHODS["cml"], "adjoint", clip_value=0.02)

    def average(values):
        values[0][0] = bad

    loss, _ = model([make_episode("vector")], 1.0, average=average)
    loss.backward()
    first, *others = (p.grad for p in model.values)
    assert not first[0].isfinite().any()
    assert max(g.abs().max() for g in (first[1:], *others)) == 0.02


def test_no_graph_outlives_an_episode():
    net = make_net("map")
    problem, params = make_problem(net)
    result = meta_gradient(params, make_episode("map"), problem, Method.sgd(2, 0.4, 0.3, 0.7), "graph", diagnose=True)
    assert all(g.grad_fn is None and not g.requires_grad for g in result.grads.values())
    assert all(t.grad_fn is None for t in result.terms.values())


def test_meta_gradient_leaves_its_arguments_alone():
    net = make_net("map")
    problem, params = make_problem(net)
    before = {n: p.clone() for n, p in params.items()}
    for engine in ("graph", "adjoint"):
        meta_gradient(params, make_episode("map"), problem, Method.sgd(3, 0.4, 0.3, 0.7), engine, diagnose=True)
    assert all(torch.equal(params[n], before[n]) and not params[n].requires_grad for n in params)


# --------------------------------------------------------------------------- eq. 8 and 9 by hand


def _by_hand(learner: str, co_adapt: str):
    """One inner step on a one-layer linear net, with gradients of the softmax cross-entropy written out."""
    torch.manual_seed(3)
    episode, alpha = make_episode("vector"), 0.3
    body = nn.Linear(5, 4, bias=False).double()
    head, co = nn.Linear(4, 3, bias=False).double(), nn.Linear(4, 3, bias=False).double()

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = body

        def forward(self, x):
            hidden = self.layer(x)
            return Features(hidden, hidden)

    net = CmlNet(Body(), head, co)
    x, y = episode.support.inputs, nn.functional.one_hot(episode.support.targets, 3).double()
    w, t, p = body.weight.detach(), head.weight.detach(), co.weight.detach()

    own = p if learner == "co" and co_adapt == "eq9" else t
    error = (torch.softmax(x @ w.T @ own.T, 1) - y) / len(x)
    new_w = w - alpha * (error @ own).T @ x
    new_t = t - alpha * error.T @ (x @ w.T)
    scored_by = p if learner == "co" else new_t  # phi never moves
    expected = episode.query.inputs @ new_w.T @ scored_by.T
    return net, episode, Method.sgd(1, alpha, alpha, 0.7), expected


@pytest.mark.parametrize(("learner", "co_adapt"), [("meta", "eq9"), ("co", "eq9"), ("co", "released")])
def test_evaluation_by_hand(learner, co_adapt):
    net, episode, method, expected = _by_hand(learner, co_adapt)
    seen = []

    def score(outputs, targets):
        seen.append(outputs)
        return accuracy(outputs, targets)

    problem = Problem(net, cross_entropy, score, {})
    params = {n: p.detach() for n, p in net.named_parameters()}
    got = score_episode(params, episode, problem, method, (learner,), co_adapt)
    assert torch.allclose(seen[0], expected, rtol=1e-12, atol=1e-13)
    assert got == accuracy(expected, episode.query.targets)
