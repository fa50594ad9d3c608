"""Against another implementation of differentiable inner loops: ``higher`` (Grefenstette et al., 1910.01727).

It is no dependency. To run this: ``pip install --no-deps --target /tmp/peers higher``, and ``PYTHONPATH=/tmp/peers``.
"""

from __future__ import annotations

import pytest
import torch
from toy import check_equal, cross_entropy, make_episode, make_net, make_problem

from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.methods.meta_sgd import MetaSgd
from cml_dist.types import Episode, Params

higher = pytest.importorskip("higher", reason="higher is not installed; see this file's docstring")

BODY_LR, HEAD_LR, GAMMA = 0.4, 0.3, 0.7


def by_higher(family: str, params: Params, adapting: list[str], episode: Episode, steps: int) -> Params:
    """Meta-gradient with a co-learner that does not adapt, with learned rates where ``params`` has them."""
    net = make_net(family)
    learned = {n: p.clone().requires_grad_() for n, p in params.items() if n.startswith("rule.lr.")}
    own = dict(net.named_parameters())
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(params[name])
    groups = [{"params": [own[n]]} for n in adapting]
    rates = [learned.get(f"rule.lr.{n}", HEAD_LR if n.startswith("head.") else BODY_LR) for n in adapting]
    inner = torch.optim.SGD(groups, lr=1.0)
    with higher.innerloop_ctx(net, inner, copy_initial_weights=False, override={"lr": rates}) as (at, optimizer):
        for _ in range(steps):
            (outputs,) = at(episode.support.inputs)
            optimizer.step(cross_entropy(outputs, episode.support.targets))
        outputs = at(episode.query.inputs, learners=("meta", "co"))
        of_head, of_co = (cross_entropy(out, episode.query.targets) for out in outputs)
        wanted = {**own, **learned}
        grads = torch.autograd.grad(of_head + GAMMA * of_co, list(wanted.values()), materialize_grads=True)
    return dict(zip(wanted, grads, strict=True))


def setting(family: str, method: str) -> tuple[InnerRule, list[str]]:
    names = [n for n, _ in make_net(family).named_parameters() if not n.startswith("colearner.")]
    if method == "anil":
        names = [n for n in names if n.startswith("head.")]
    cls = MetaSgd if method == "meta_sgd" else InnerRule
    return cls(BODY_LR, HEAD_LR, frozenset(names)), names


@pytest.mark.parametrize("family", ["vector", "map", "attention"])
@pytest.mark.parametrize("method", ["maml", "anil", "meta_sgd"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_higher_agrees(family, method, steps, engine):
    rule, adapting = setting(family, method)
    net, episode = make_net(family), make_episode(family)
    net.add_rule(rule.init(net.adaptable()))
    problem, params = make_problem(net)
    generator = torch.Generator().manual_seed(3)
    for name in (n for n in params if n.startswith("rule.")):
        params[name] *= 0.5 + torch.rand(params[name].shape, generator=generator, dtype=torch.float64)
    ours = meta_gradient(params, episode, problem, Method(steps, rule, GAMMA), engine).grads
    check_equal(ours, by_higher(family, params, adapting, episode, steps), rel=1e-10)
