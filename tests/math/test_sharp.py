"""Sharp-MAML's upper level in float64: the meta-gradient at the end of an ascent along the one over all episodes.

Its lower level, a step of the inner loop, is in test_methods.py; the ranks' common ascent in tests/dist.
"""

from __future__ import annotations

import pytest
import torch
from toy import (
    accuracy,
    check_equal,
    check_slopes,
    cross_entropy,
    make_episode,
    make_net,
    plain_gradient,
    plain_objective,
    slopes,
)

from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.methods.sharp import SharpSgd
from cml_dist.types import EachTime, Params

RADIUS, COUNT = 0.3, 3
METHOD = Method(2, InnerRule(0.4, 0.3), 0.7, ascent=RADIUS)
EPISODES = [make_episode("map", index) for index in range(COUNT)]


def mean_gradient(net, params: Params) -> Params:
    """Of all episodes, by an unrolled loop that nothing of the core is part of."""
    each = [plain_gradient(net, params, episode, METHOD) for episode in EPISODES]
    return {n: sum(g[n] for g in each) / COUNT for n in params}


def above(net, params: Params) -> Params:
    """theta + alpha h / |h|, with one norm over body, head and co-learner."""
    h = mean_gradient(net, params)
    norm = torch.cat([g.flatten() for g in h.values()]).norm()
    return {n: p + RADIUS * h[n] / norm for n, p in params.items()}


@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_the_meta_gradient_is_that_at_the_end_of_the_ascent(engine):
    """Against the written-out loop and central differences there; what is reported is of the parameters themselves."""
    net = make_net("map")
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    model, point, asked = MetaModel(net, cross_entropy, accuracy, METHOD, engine), above(net, params), []

    def ask():
        asked.append(True)
        return iter(EPISODES)

    loss, sums = model(EachTime(ask), 1 / COUNT)
    loss.backward()
    got = {n: p.grad for n, p in zip(model.names, model.values, strict=True)}
    check_equal(got, mean_gradient(net, point))

    def objective(p: Params):
        leaves = {n: value.detach().requires_grad_() for n, value in p.items()}
        return sum(plain_objective(net, leaves, episode, METHOD) for episode in EPISODES) / COUNT

    check_slopes(got, slopes(objective, point))
    assert loss.item() == pytest.approx(objective(params).item(), rel=1e-12)
    assert (len(asked), sums["loss"][1]) == (2, COUNT)
    assert all(torch.equal(p, params[n]) for n, p in model.params().items()), "the parameters never move"


def test_an_iterator_is_refused_since_its_episodes_come_once():
    model = MetaModel(make_net("map"), cross_entropy, accuracy, METHOD, "adjoint")
    with pytest.raises(TypeError, match="give a list or EachTime"):
        model(iter(EPISODES), 1.0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("engine", ["graph", "adjoint"])
def test_where_there_is_no_slope_an_inner_ascent_goes_nowhere(engine, exact):
    """A support loss whose gradient is exactly zero: the step is none, and no derivative is NaN."""
    net = make_net("vector")
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    rule = SharpSgd(0.4, 0.3, frozenset({"body.layers.0.weight"}), radius=RADIUS, exact=exact)
    model = MetaModel(net, cross_entropy, accuracy, Method(2, rule, 0.7), engine)
    loss, _ = model([make_episode("vector")], 1.0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.values)
