"""bfloat16 inside the network: what it costs, and what bfloat16 weights would do to the inner step."""

from __future__ import annotations

import pytest
import torch
from toy import accuracy, cross_entropy, make_episode, make_net, relative_error

from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.inner import adapt
from cml_dist.meta.model import MetaModel
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.types import Batch, Episode

METHOD = Method.sgd(2, 0.1, 0.1, gamma=0.7)


def single(episode: Episode) -> Episode:
    """In float32, as training with autocast is."""

    def batch(b: Batch) -> Batch:
        return Batch(b.inputs.float(), b.targets)

    return Episode(batch(episode.support), batch(episode.query), episode.split, episode.index)


def problem_of(net, autocast):
    return Problem(net, cross_entropy, accuracy, dict(net.named_buffers()), autocast=autocast)


@pytest.mark.parametrize("family", ["vector", "attention"])
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_the_gradient_is_that_of_float32_to_bfloat16s_precision(family, engine):
    net, episode = make_net(family).float(), single(make_episode(family))
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    full = meta_gradient(params, episode, problem_of(net, None), METHOD, engine).grads
    half = meta_gradient(params, episode, problem_of(net, torch.bfloat16), METHOD, engine).grads
    assert all(g.dtype == torch.float32 for g in half.values())
    assert 1e-5 < relative_error(half, full) < 0.05  # not equal: the network really computes in bfloat16


def test_engines_agree_inside_bfloat16():
    net, episode = make_net("vector").float(), single(make_episode("vector"))
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    problem = problem_of(net, torch.bfloat16)
    graph, adjoint = (meta_gradient(params, episode, problem, METHOD, e).grads for e in ("graph", "adjoint"))
    assert relative_error(graph, adjoint) < 0.02


def test_bfloat16_weights_lose_the_inner_step_and_ours_keep_it():
    """A step of 1e-4 of the weights: below bfloat16's 8 bits, so weights held in it do not move at all."""
    net, episode = make_net("vector").float(), single(make_episode("vector"))
    params = {n: p.detach().clone() for n, p in net.named_parameters() if not n.startswith("colearner.")}
    with torch.no_grad():
        for p in params.values():
            p.copy_(torch.ones_like(p))  # where bfloat16's next number is 1/128 away
    method = Method.sgd(5, 1e-4, 1e-4)
    want = adapt(params, episode, problem_of(net, None), method)
    ours = adapt(params, episode, problem_of(net, torch.bfloat16), method)
    naive_params = {n: p.bfloat16() for n, p in params.items()}
    batch = Batch(episode.support.inputs.bfloat16(), episode.support.targets)
    naive_episode = Episode(batch, batch, "train", 0)
    naive = adapt(naive_params, naive_episode, problem_of(net, None), method)

    def moved(adapted):
        return sum((adapted[n].float() - params[n]).square().sum() for n in params).sqrt().item()

    assert moved(want) > 0
    assert moved(naive) == 0
    assert moved(ours) == pytest.approx(moved(want), rel=0.1)
    assert all(p.dtype == torch.float32 for p in ours.values())


def test_parameters_and_moments_stay_float32():
    net, episode = make_net("vector").float(), single(make_episode("vector"))
    model = MetaModel(net, cross_entropy, accuracy, METHOD, "adjoint", autocast=torch.bfloat16)
    optimizer = torch.optim.Adam(model.values)
    model([episode], 1.0)[0].backward()
    optimizer.step()
    assert {p.dtype for p in model.values} == {p.grad.dtype for p in model.values} == {torch.float32}
    moments = [m for state in optimizer.state.values() for m in state.values()]
    assert moments and {m.dtype for m in moments} == {torch.float32}
