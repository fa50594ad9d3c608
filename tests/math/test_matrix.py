"""The contract matrix on one process: engine, micro-batch, trajectory, co-learner and rule change no meta-gradient.

What test_micro_batches.py and test_methods.py hold is left out here.
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import nn
from toy import accuracy, check_equal, cross_entropy, make_net, relative_error, uneven_episode

from cml_dist.meta.gradient import Engine, MetaGradient, meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.methods.inner_optim import Adam
from cml_dist.methods.lora import Lora
from cml_dist.methods.maml_pp import MamlPlusPlus
from cml_dist.methods.meta_sgd import MetaSgd
from cml_dist.methods.mgaug import Pruning
from cml_dist.methods.sharp import SharpSgd
from cml_dist.methods.warpgrad import WarpGrad, is_warp
from cml_dist.nets.heads import build_head
from cml_dist.nets.network import CmlNet
from cml_dist.types import Batch, Episode

STEPS, GAMMA = 4, 0.7
BETWEEN = frozenset(f"{n}.weight" for n in ("body.layers.0", "body.layers.2", "head"))
RULES = {
    "sgd": InnerRule(0.4, 0.3),
    "meta_sgd": MetaSgd(0.4, 0.3),
    "maml_pp": MamlPlusPlus(0.4, 0.3, steps=STEPS, multi_step_loss=1),
    "sharp": SharpSgd(0.4, 0.3, radius=0.3),
    "adam": Adam(0.08, 0.06),
    "lora": Lora(0.4, 0.3, frozenset(["head.weight"]), rank=2, beside=(("body.layers.2.weight", 6, 8),)),
    "warpgrad": WarpGrad(0.4, 0.3, BETWEEN),
    "tnet": InnerRule(0.4, 0.3, BETWEEN),
    "mgaug": InnerRule(0.4, 0.3),
}
PRUNING = Pruning("catfish", (0.2, 0.5), (("body.layers.0.weight",), ("body.layers.2.weight",)))
COLEARNERS = ("none", "dense", "prototype")
GRAPH, ALL, SQRT = Engine("graph"), Engine("adjoint"), Engine("adjoint", trajectory="sqrt")
SIZES = (None, 1, 2, 4)
"""Of 6 support and 9 query examples, of classes of unequal numbers."""


def is_held_elsewhere(engine: Engine, size: int | None, colearner: str, rule: str) -> bool:
    return engine != SQRT and rule == "sgd" and colearner in ("dense", "prototype") or (engine, size) == (GRAPH, None)


MATRIX = [
    pytest.param(*case, id="-".join(map(str, (case[0].name, case[0].trajectory, *case[1:]))))
    for case in itertools.product((GRAPH, ALL, SQRT), SIZES, COLEARNERS, RULES)
    if not is_held_elsewhere(*case)
]


def make(colearner: str, rule: InnerRule, head: str = "linear") -> CmlNet:
    made = make_net("warped" if rule.adapts == BETWEEN else "vector", colearner=colearner != "none")
    torch.manual_seed(3)
    second = nn.Linear(6, 4).double() if colearner == "prototype" else made.colearner
    started = made.head if head == "linear" else build_head(head, 6, 3).double()
    net = CmlNet(made.body, started, second, prototypes=colearner == "prototype")
    net.add_rule(rule.init(net.adaptable()))
    return net


def gradient(engine: Engine, size: int | None, colearner: str, rule: str) -> MetaGradient:
    net = make(colearner, RULES[rule])
    params = {n: p.detach() for n, p in net.named_parameters()}
    problem = Problem(net, cross_entropy, accuracy, {}, micro_batch=size)
    augment = PRUNING if rule == "mgaug" else None
    method = Method(STEPS, RULES[rule], 0.0 if colearner == "none" else GAMMA, augment=augment)
    return meta_gradient(params, uneven_episode(), problem, method, engine)


@cache
def reference(colearner: str, rule: str) -> MetaGradient:
    return gradient(GRAPH, None, colearner, rule)


@pytest.mark.parametrize(("engine", "size", "colearner", "rule"), MATRIX)
def test_any_way_gives_the_meta_gradient_of_the_whole_graph(engine, size, colearner, rule):
    got, expected = gradient(engine, size, colearner, rule), reference(colearner, rule)
    check_equal(got.grads, expected.grads, rel=1e-12)
    assert {n: t.item() for n, t in got.terms.items()} == pytest.approx(
        {n: t.item() for n, t in expected.terms.items()}, rel=1e-12
    )


@pytest.mark.parametrize("head", ["linear", "centroid"])
@pytest.mark.parametrize(("engine", "size"), [(ALL, 2), (SQRT, None)])
def test_features_of_one_length_have_one_meta_gradient_too(engine, size, head):
    def gradient(engine: Engine, size: int | None) -> MetaGradient:
        net = make("dense", RULES["sgd"], head)
        net.feature_length = 2.0
        params = {n: p.detach() for n, p in net.named_parameters()}
        problem = Problem(net, cross_entropy, accuracy, {}, micro_batch=size)
        return meta_gradient(params, uneven_episode(), problem, Method(STEPS, RULES["sgd"], GAMMA), engine)

    check_equal(gradient(engine, size).grads, gradient(GRAPH, None).grads, rel=1e-12)


def test_the_references_differ():
    """Each rule and each co-learner has a gradient of its own in the body."""
    body = [
        {n: g for n, g in reference(*case).grads.items() if n.startswith("body.") and not is_warp(n)}
        for case in itertools.product(COLEARNERS, RULES)
        if case[1] not in ("meta_sgd", "tnet")  # begins with the rates of sgd; learns as warpgrad between warp layers
    ]
    assert all(relative_error(one, two) > 1e-2 for one, two in itertools.combinations(body, 2))
    warps = [{n: g for n, g in reference("dense", rule).grads.items() if is_warp(n)} for rule in ("warpgrad", "tnet")]
    assert relative_error(*warps) > 1e-2
    assert all(g.any() for n, g in reference("dense", "meta_sgd").grads.items() if n.startswith("rule."))


# --------------------------------------------------------------------------- bfloat16 by autocast


def single(batch: Batch) -> Batch:
    return Batch(batch.inputs.float(), batch.targets)


@pytest.mark.parametrize("engine", [GRAPH, ALL], ids=lambda engine: engine.name)
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize(("head", "rule"), [("linear", "meta_sgd"), ("ridge", "sgd"), ("ridge", "meta_sgd")])
def test_inside_bfloat16_what_is_learned_stays_float32(engine, size, head, rule):
    """A learned step and a system of equations: float32 gradients, finite, and those of float32 to its precision."""
    net, made = make("prototype", RULES[rule], head).float(), uneven_episode()
    params = {n: p.detach() for n, p in net.named_parameters()}
    episode = Episode(single(made.support), single(made.query), made.split, made.index, ways=made.ways)
    half, full = (
        meta_gradient(
            params,
            episode,
            Problem(net, cross_entropy, accuracy, {}, micro_batch=size, autocast=autocast),
            Method(2, RULES[rule], GAMMA),
            engine,
        )
        for autocast in (torch.bfloat16, None)
    )
    assert half.grads.keys() == params.keys()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in half.grads.values())
    assert all(t.isfinite() for t in half.terms.values())
    assert 1e-5 < relative_error(half.grads, full.grads) < 0.1  # not equal: the network really computes in bfloat16
