"""Micro-batches and parts that do not adapt: the same meta-gradient, in float64."""

from __future__ import annotations

import pytest
import torch
from toy import make_episode, make_net, make_problem, plain_gradient, relative_error

from cml_dist.meta.gradient import Engine, meta_gradient
from cml_dist.meta.rule import Method
from cml_dist.run.evaluator import score_episode

FAMILIES = ("vector", "attention")  # no norm couples their examples
SUPPORT, QUERY = 6, 9  # examples of a toy episode


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("size", range(1, QUERY + 1))
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_any_micro_batch_gives_the_same_gradient_and_terms(family, order, size, engine):
    """Sizes that divide neither set leave smaller last chunks: their weights count."""
    net = make_net(family)
    problem, params = make_problem(net)
    episode, method = make_episode(family), Method.sgd(3, 0.4, 0.3, gamma=0.7, order=order)
    whole = meta_gradient(params, episode, problem, method, engine, diagnose=True)
    problem.micro_batch = size
    parts = meta_gradient(params, episode, problem, method, engine, diagnose=True)
    assert relative_error(parts.grads, plain_gradient(net, params, episode, method)) < 1e-12
    assert parts.terms.keys() == whole.terms.keys()
    for name, value in whole.terms.items():
        assert torch.allclose(parts.terms[name].double(), value.double(), rtol=1e-12, atol=0), name


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("learner", ["meta", "co"])
def test_scores_are_the_same_in_micro_batches(size, learner):
    problem, params = make_problem(make_net("attention"))
    episode, method = make_episode("attention"), Method.sgd(3, 0.4, 0.3, gamma=0.7)
    whole = score_episode(params, episode, problem, method, (learner,))
    problem.micro_batch = size
    assert torch.equal(score_episode(params, episode, problem, method, (learner,)), whole)


def test_a_micro_batch_bounds_what_passes_through_the_network():
    net = make_net("vector")
    problem, params = make_problem(net)
    sizes = []
    problem.structure.body.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    problem.micro_batch = 4
    meta_gradient(params, make_episode("vector"), problem, Method.sgd(1, 0.4, 0.3, gamma=0.7), "adjoint")
    # Inner step, query, pull back; 6 support and 9 query examples.
    assert sizes == [4, 2, 4, 4, 1, 4, 2]


def test_an_episode_tells_of_each_pass_through_the_network():
    """Between inner steps and micro-batches: whoever waits for a long episode sees that it gets on."""
    problem, params = make_problem(make_net("vector"))
    told = []
    problem.on_pass = lambda: told.append(1)
    problem.micro_batch = 4
    meta_gradient(params, make_episode("vector"), problem, Method.sgd(3, 0.4, 0.3, gamma=0.7), "adjoint")
    assert len(told) == 3 * 2 + 3 + 3 * 2  # steps of 2 pieces, a query of 3, pull-backs of 2


@pytest.mark.parametrize("family", ["vector", "map", "attention"])
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_adapting_part_equals_an_unrolled_loop_of_that_part(family, engine, steps):
    """What does not adapt is still meta-trained: its gradient passes through the steps that it shapes."""
    net = make_net(family)
    problem, params = make_problem(net)
    episode = make_episode(family)
    adapts = frozenset([n for n in params if n.startswith("body.")][-2:] + ["head.bias"])
    method = Method.sgd(steps, 0.4, 0.3, gamma=0.7, adapts=adapts)
    ours = meta_gradient(params, episode, problem, method, engine)

    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    fast = dict(leaves)
    for _ in range(steps):
        (outputs,) = torch.func.functional_call(net, fast, (episode.support.inputs,))
        loss = torch.nn.functional.cross_entropy(outputs, episode.support.targets)
        grads = torch.autograd.grad(loss, [fast[n] for n in adapts], create_graph=True)
        for name, grad in zip(adapts, grads, strict=True):
            fast[name] = fast[name] - (0.3 if name.startswith("head.") else 0.4) * grad
    outputs = torch.func.functional_call(net, fast, (episode.query.inputs,), {"learners": ("meta", "co")})
    total = sum(
        w * torch.nn.functional.cross_entropy(o, episode.query.targets) for w, o in zip((1, 0.7), outputs, strict=True)
    )
    expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert relative_error(ours.grads, expected) < 1e-12


def test_the_path_may_lie_elsewhere():
    """On a machine without a GPU the CPU is the only elsewhere: the tensors take the same way."""
    problem, params = make_problem(make_net("vector"))
    episode, method = make_episode("vector"), Method.sgd(3, 0.4, 0.3, gamma=0.7)
    here = meta_gradient(params, episode, problem, method, "adjoint")
    there = meta_gradient(params, episode, problem, method, Engine("adjoint", device=torch.device("cpu")))
    for name, grad in here.grads.items():
        assert torch.equal(there.grads[name], grad)
