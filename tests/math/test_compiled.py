"""The compiled meta-gradient is the eager one, in float64 to 1e-10; where it is missing or wrong, eager goes on."""

from __future__ import annotations

import pytest
import torch
from methods_worker import CASES
from methods_worker import make as make_case
from test_matrix import RULES
from toy import make_episode, make_net, make_problem

from cml_dist.meta.compiled import CHECKED, MOST_GRAPHS, CompiledGradient, distance
from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.types import Batch, Episode

CPU = torch.device("cpu")


def check(compute, params, problem, method, episodes, engine="graph"):
    """``compute`` gives the eager values on each episode, and by a graph."""
    for episode in episodes:
        ours, eager = (how(params, episode, problem, method, engine) for how in (compute, meta_gradient))
        assert distance(ours.grads, eager.grads) < 1e-10
        assert {n: t.item() for n, t in ours.terms.items()} == pytest.approx(
            {n: t.item() for n, t in eager.terms.items()}, rel=1e-10
        )
    assert all(graph.run is not None for graph in compute.graphs.values())


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_traced(rule):
    net = make_net("vector")
    net.add_rule(RULES[rule].init(net.adaptable()))
    problem, params = make_problem(net)
    episodes = [make_episode("vector", index) for index in range(CHECKED + 1)]
    check(CompiledGradient("eager"), params, problem, Method(2, RULES[rule], 0.7), episodes)


def test_a_compiled_gradient_is_the_eager_one():
    problem, params = make_problem(make_net("vector"))
    episodes = [make_episode("vector", index) for index in range(CHECKED + 1)]
    check(CompiledGradient(), params, problem, Method.sgd(1, 0.4, 0.3, gamma=0.7), episodes)


METHODS = "maml fomaml meta_sgd maml_pp sharp_both momentum adam lora ridge both_adapt nodes_dropout".split()
"""Of the cases; the others differ in what adapts, or in nothing that a graph shows."""


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_compiled(name):
    case = CASES[name]
    net, method, domain = make_case(case)
    problem = Problem(net, domain.loss, domain.score, dict(net.named_buffers()), micro_batch=case.micro_batch)
    params = {n: p.detach() for n, p in net.named_parameters()}
    episodes = [domain.prepare(domain.episode("train", index), CPU, torch.float64) for index in range(CHECKED + 1)]
    check(CompiledGradient(), params, problem, method, episodes, "adjoint")


# --------------------------------------------------------------------------- where it cannot be had


class Told(list):
    __call__ = list.append


def toy():
    problem, params = make_problem(make_net("vector"))
    return params, problem, Method.sgd(1, 0.4, 0.3, gamma=0.7)


def test_what_cannot_be_compiled_is_computed_eagerly_and_said():
    def backend(graph, inputs):
        raise RuntimeError("no compiler here\nand a long trace")

    (params, problem, method), told, episode = toy(), Told(), make_episode("vector")
    found = CompiledGradient(backend, tell=told)(params, episode, problem, method, "graph")
    assert distance(found.grads, meta_gradient(params, episode, problem, method, "graph").grads) == 0
    assert "not compiled" in told[-1] and "no compiler here" in told[-1] and "trace" not in told[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_graph_that_is_wrong_is_not_used(dtype):
    def backend(graph, inputs):
        return lambda *arguments: [1.2 * out if out.is_floating_point() else out for out in graph(*arguments)]

    (params, problem, method), told, episode = toy(), Told(), make_episode("vector")
    params, episode = {n: p.to(dtype) for n, p in params.items()}, episode.map(
        lambda t: t.to(dtype) if t.is_floating_point() else t
    )
    found = CompiledGradient(backend, tell=told)(params, episode, problem, method, "graph")
    assert distance(found.grads, meta_gradient(params, episode, problem, method, "graph").grads) == 0
    assert "wrong: its gradient is 2.0e-01" in told[-1]


def test_what_one_episode_leaves_in_a_graph_is_found():
    class Remembers(InnerRule):
        def start(self, meta, episode):
            fast, const = super().start(meta, episode)
            return {n: value * (1 + 0.1 * episode.index) for n, value in fast.items()}, const

    (params, problem, _), told = toy(), Told()
    compute, method = CompiledGradient("aot_eager", tell=told), Method(1, Remembers(0.4, 0.3), 0.7)
    for index in range(2):
        episode = make_episode("vector", index)
        found = compute(params, episode, problem, method, "graph")
        assert distance(found.grads, meta_gradient(params, episode, problem, method, "graph").grads) < 1e-10
    assert "wrong" in told[-1]


def test_shapes_beyond_the_most_are_not_compiled():
    (params, problem, method), told = toy(), Told()
    compute, whole = CompiledGradient("eager", tell=told), make_episode("vector")
    for count in range(3, 3 + MOST_GRAPHS + 2):
        query = Batch(whole.query.inputs[:count], whole.query.targets[:count])
        episode = Episode(whole.support, query, "train", 0, ways=whole.ways)
        found = compute(params, episode, problem, method, "graph")
        assert distance(found.grads, meta_gradient(params, episode, problem, method, "graph").grads) < 1e-10
    assert sum(graph.run is not None for graph in compute.graphs.values()) == MOST_GRAPHS
    assert sum("not compiled" in sentence for sentence in told) == 1
