"""The shape of a method carries any rule: rules of the literature as small subclasses, in float64.

Each is held against the same method as a plain loop written here (differentiated by autograd, and by central
differences), on both engines; two of them are the package's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
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
    uneven_episode,
)

from cml_dist.meta.gradient import MetaGradient, meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import GradFn, InnerRule, Method, Term
from cml_dist.methods.inner_optim import Adam
from cml_dist.methods.lora import Lora
from cml_dist.methods.sharp import SharpSgd
from cml_dist.nets.network import CmlNet
from cml_dist.nets.partition import freeze
from cml_dist.types import Episode, Params

RATE, HEAD_RATE, GAMMA, STEPS = 0.4, 0.3, 0.7, 3
FIRST, SECOND, HEAD = (
    [f"{layer}.{kind}" for kind in ("weight", "bias")] for layer in ("body.layers.0", "body.layers.2", "head")
)
ADAPTS = [*FIRST, *SECOND, *HEAD]
ENGINES = ["graph", "adjoint"]


# --------------------------------------------------------------------------- what the plain loops share


@dataclass(frozen=True)
class World:
    """An episode and a network, for the plain loops: losses of all that the network sees."""

    net: CmlNet
    episode: Episode

    def support(self, seen: Params) -> Tensor:
        (outputs,) = functional_call(self.net, self._own(seen), (self.episode.support.inputs,))
        return cross_entropy(outputs, self.episode.support.targets)

    def query(self, seen: Params) -> Tensor:
        """L(f_m) + gamma L(f_c)."""
        arguments = (self.episode.query.inputs,), {"learners": ("meta", "co")}
        of_head, of_co = functional_call(self.net, self._own(seen), *arguments)
        return cross_entropy(of_head, self.episode.query.targets) + GAMMA * cross_entropy(
            of_co, self.episode.query.targets
        )

    @staticmethod
    def _own(seen: Params) -> Params:
        return {n: p for n, p in seen.items() if n.startswith(("body.", "head.", "colearner."))}


def rate_of(name: str) -> float:
    return HEAD_RATE if name.startswith("head.") else RATE


def held(p: Params) -> Params:
    return {n: value.detach() for n, value in p.items()}


# --------------------------------------------------------------------------- the rules, and each as a plain loop


def sharp_lower(p: Params, world: World) -> Tensor:
    for _ in range(STEPS):
        g = partial(world.support, p, ADAPTS)
        flat = torch.cat([v.flatten() for v in g.values()])
        there = {**p, **{n: p[n] + 0.3 * g[n] / (flat.norm() + 1e-12) for n in ADAPTS}}
        g = partial(world.support, there, ADAPTS)
        p = {**p, **{n: p[n] - rate_of(n) * g[n] for n in ADAPTS}}
    return world.query(p)


WEIGHTS = (0.2, 0.3, 0.5)


@dataclass(frozen=True)
class PlusPlus(InnerRule):
    """MAML++: a learned rate a tensor a step, gains and biases of the norm a step, losses after all steps."""

    def init(self, params: Params) -> Params:
        rates = self.rates(params)
        learned = {f"rule.lr.{n}": torch.full((STEPS,), rate).to(params[n]) for n, rate in rates.items()}
        norm = {f"rule.{n}": params[n].repeat(STEPS, 1) for n in params if n.startswith("body.norm.")}
        return {**learned, **norm}

    def view(self, meta: Params, fast: Params, const: Params, k: int) -> Params:
        seen = super().view(meta, fast, const, k)
        return {n: meta[f"rule.{n}"][k] if n.startswith("body.norm.") else v for n, v in seen.items()}

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        g = grad(fast)
        return {n: v - meta[f"rule.lr.{n}"][k] * g[n] for n, v in fast.items()}

    def terms(self, meta_step: int, steps: int) -> tuple[Term, ...]:
        return (Term(WEIGHTS),)


PLUS_ADAPTS = ["body.qkv.weight", "body.qkv.bias", *HEAD]


def plus_plus(p: Params, world: World) -> Tensor:
    total = torch.zeros(()).double()
    for k in range(STEPS):
        p = {**p, **{f"body.norm.{kind}": p[f"rule.body.norm.{kind}"][k] for kind in ("weight", "bias")}}
        g = partial(world.support, p, PLUS_ADAPTS)
        p = {**p, **{n: p[n] - p[f"rule.lr.{n}"][k] * g[n] for n in PLUS_ADAPTS}}
        total = total + WEIGHTS[k] * world.query(p)
    return total


@dataclass(frozen=True)
class LowRank(InnerRule):
    """Two factors adapt instead of the first layer's weight, which sees their product; they start from learned ones."""

    def init(self, params: Params) -> Params:
        wide, deep = params["body.layers.0.weight"].shape
        return {"rule.A": params["head.weight"].new_zeros(wide, 2), "rule.B": params["head.weight"].new_zeros(2, deep)}

    def start(self, meta: Params, episode: Episode) -> tuple[Params, Params]:
        return {"body.A": meta["rule.A"], "body.B": meta["rule.B"], **{n: meta[n] for n in HEAD}}, {}

    def view(self, meta: Params, fast: Params, const: Params, k: int) -> Params:
        seen = super().view(meta, fast, const, k)
        a, b = seen.pop("body.A"), seen.pop("body.B")
        return {**seen, "body.layers.0.weight": seen["body.layers.0.weight"] + a @ b}


def low_rank(p: Params, world: World) -> Tensor:
    def seen(q: Params) -> Params:
        return {**q, "body.layers.0.weight": q["body.layers.0.weight"] + q["rule.A"] @ q["rule.B"]}

    names = ["rule.A", "rule.B", *HEAD]
    for _ in range(STEPS):
        g = partial(lambda q: world.support(seen(q)), p, names)
        p = {**p, **{n: p[n] - rate_of(n) * g[n] for n in names}}
    return world.query(seen(p))


LORA = Lora(RATE, HEAD_RATE, frozenset(HEAD), rank=2, beside=((FIRST[0], 8, 5), (SECOND[0], 6, 8)))


def lora(p: Params, world: World) -> Tensor:
    """LoRA (Hu et al., eq. 3): A and B of two weights adapt, which the network sees as W + B A; W may be frozen."""
    weights = {n: {**dict(world.net.named_buffers()), **p}[n] for n in (FIRST[0], SECOND[0])}
    names = [f"rule.lora.{n}.{factor}" for n in weights for factor in "AB"]

    def seen(q: Params) -> Params:
        return {**q, **{n: w + q[f"rule.lora.{n}.B"] @ q[f"rule.lora.{n}.A"] for n, w in weights.items()}}

    for _ in range(STEPS):
        g = partial(lambda q: world.support(seen(q)), p, [*names, *HEAD])
        p = {**p, **{n: p[n] - rate_of(n) * g[n] for n in g}}
    return world.query(seen(p))


def mask_of(episode: Episode, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + episode.index)
    return (torch.rand(like.shape, generator=generator, dtype=like.dtype) < 0.6).to(like)


@dataclass(frozen=True)
class Masked(InnerRule):
    """A mask that is drawn for the episode prunes the first layer, in the inner loop and in the query."""

    def start(self, meta: Params, episode: Episode) -> tuple[Params, Params]:
        fast, const = super().start(meta, episode)
        return fast, {**const, "mask": mask_of(episode, meta["body.layers.0.weight"])}

    def view(self, meta: Params, fast: Params, const: Params, k: int) -> Params:
        seen = super().view(meta, fast, const, k)
        return {**seen, "body.layers.0.weight": seen["body.layers.0.weight"] * const["mask"]}


def masked(p: Params, world: World) -> Tensor:
    name = "body.layers.0.weight"
    mask = mask_of(world.episode, p[name])
    for _ in range(STEPS):
        g = partial(lambda q: world.support({**q, name: q[name] * mask}), p, ADAPTS)
        p = {**p, **{n: p[n] - rate_of(n) * g[n] for n in ADAPTS}}
    return world.query({**p, name: p[name] * mask})


WARP = [f"rule.warp.{kind}" for kind in ("weight", "bias")]


@dataclass(frozen=True)
class Warp(InnerRule):
    """WarpGrad: the second layer never adapts; it learns from each visited point by one step, the rest by MAML."""

    def init(self, params: Params) -> Params:
        return dict(zip(WARP, (params[n] for n in SECOND), strict=True))

    def view(self, meta: Params, fast: Params, const: Params, k: int) -> Params:
        return {**super().view(meta, fast, const, k), **{n: meta[w] for n, w in zip(SECOND, WARP, strict=True)}}

    def terms(self, meta_step: int, steps: int) -> tuple[Term, ...]:
        ordinary = (0.0,) * (steps - 1) + (1.0,)
        return Term(ordinary, trains="[!r]*"), Term((1.0, 0.5, 2.0), horizon=1, trains="rule.warp.*")


def warp(p: Params, world: World, only: str = "") -> Tensor:
    """Both terms, each a function of what it trains alone; ``only``: one of them."""
    names = [*FIRST, *HEAD]

    def step(q: Params) -> Params:
        seen = {**q, **{n: q[w] for n, w in zip(SECOND, WARP, strict=True)}}
        g = partial(world.support, seen, names)
        return {**seen, **{n: seen[n] - rate_of(n) * g[n] for n in names}}

    ordinary = {n: v.detach() if n in WARP else v for n, v in p.items()}
    for _ in range(STEPS):
        ordinary = step(ordinary)
    total, visited = world.query(ordinary), held(p)
    for weight in (1.0, 0.5, 2.0):
        after = step({**visited, **{w: p[w] for w in WARP}})
        total = total + weight * world.query(after)
        visited = held(after)
    return total


@dataclass(frozen=True)
class Proximal(InnerRule):
    """A further outer term: how far the inner loop went, weighted by a learned number; and a learned start of its own.

    The start of the head depends on the body, which adapts too: inner gradients must be partial ones.
    """

    def init(self, params: Params) -> Params:
        return {"rule.weight": torch.ones(1).to(params["head.weight"])}

    def start(self, meta: Params, episode: Episode) -> tuple[Params, Params]:
        fast, const = super().start(meta, episode)
        tied = {"head.weight": fast["head.weight"] + 0.3 * meta["body.layers.2.weight"][:3, :6]}
        return {**fast, **tied}, {**const, "centre": meta["body.layers.0.bias"] * 0.5}

    def penalty(self, meta: Params, fast: Params, const: Params, episode: Episode) -> Tensor:
        far = sum((fast[n] - meta[n]).square().sum() for n in FIRST + HEAD)
        return meta["rule.weight"].square().sum() * far + 0.1 * (fast[FIRST[1]] - const["centre"]).square().sum()


def proximal(p: Params, world: World) -> Tensor:
    at = {**p, "head.weight": p["head.weight"] + 0.3 * p["body.layers.2.weight"][:3, :6]}
    for _ in range(STEPS):
        g = partial(world.support, at, ADAPTS)
        at = {**at, **{n: at[n] - rate_of(n) * g[n] for n in ADAPTS}}
    far = sum(((at[n] - p[n]) ** 2).sum() for n in FIRST + HEAD)
    bent = ((at[FIRST[1]] - 0.5 * p[FIRST[1]]) ** 2).sum()
    return world.query(at) + p["rule.weight"][0] ** 2 * far + 0.1 * bent


@dataclass(frozen=True)
class Coupled(InnerRule):
    """One fast value is made of another's next one (as with lookahead, or weights tied within a step).

    Where both are asked for a gradient, it is the partial one: the other is held.
    """

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        after = super().update(meta, fast, const, grad, k)
        return {**after, "head.bias": after["head.bias"] + 0.3 * after["body.layers.2.bias"][:3]}


def coupled(p: Params, world: World) -> Tensor:
    for _ in range(STEPS):
        g = partial(world.support, p, ADAPTS)
        p = {**p, **{n: p[n] - rate_of(n) * g[n] for n in ADAPTS}}
        p = {**p, "head.bias": p["head.bias"] + 0.3 * p["body.layers.2.bias"][:3]}
    return world.query(p)


@dataclass(frozen=True)
class Case:
    """A rule, the same as a plain loop, and what it is tried on."""

    rule: InnerRule
    plain: Callable[[Params, World], Tensor]
    family: str = "vector"
    frozen: tuple[str, ...] = ()


CASES = {
    "sharp_lower": Case(SharpSgd(RATE, HEAD_RATE, radius=0.3), sharp_lower),
    "plus_plus": Case(PlusPlus(RATE, HEAD_RATE, frozenset(PLUS_ADAPTS)), plus_plus, "attention"),
    "low_rank": Case(LowRank(RATE, HEAD_RATE), low_rank),
    "lora": Case(LORA, lora),
    "lora_beside_frozen_weights": Case(LORA, lora, frozen=(*FIRST, SECOND[0])),
    "masked": Case(Masked(RATE, HEAD_RATE), masked),
    "warp": Case(Warp(RATE, HEAD_RATE, frozenset([*FIRST, *HEAD])), warp),
    "proximal": Case(Proximal(RATE, HEAD_RATE), proximal),
    "coupled": Case(Coupled(RATE, HEAD_RATE), coupled),
}


def make(family: str, rule: InnerRule, frozen: tuple[str, ...] = ()) -> tuple[Problem, Params, World]:
    """What a rule learns is moved off its initial values."""
    net = make_net(family)
    freeze(net, [n for n, _ in net.named_parameters() if n not in frozen])
    net.add_rule(rule.init(net.adaptable()))
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(7)
    for name in params:
        if name.startswith("rule."):
            noise = torch.randn(params[name].shape, generator=generator, dtype=torch.float64)
            params[name] = params[name] + 0.2 * noise
    episode = make_episode(family, 1) if family != "vector" else uneven_episode(index=1)
    return Problem(net, cross_entropy, accuracy, dict(net.named_buffers())), params, World(net, episode)


def ours(case: Case, engine: str, micro_batch: int | None = None) -> MetaGradient:
    problem, params, world = make(case.family, case.rule, case.frozen)
    problem.micro_batch = micro_batch
    return meta_gradient(params, world.episode, problem, Method(STEPS, case.rule, GAMMA), engine)


@cache
def by_plain_loop(name: str) -> tuple[float, Params]:
    case = CASES[name]
    _, params, world = make(case.family, case.rule, case.frozen)
    return total_gradient(lambda p: case.plain(p, world), params)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [None, 1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rule_equals_its_plain_loop(name, size, engine):
    """Both engines, the support and query sets whole and in micro-batches."""
    got, (value, grads) = ours(CASES[name], engine, size), by_plain_loop(name)
    assert got.terms["loss"].item() == pytest.approx(value, rel=1e-13)
    check_equal(got.grads, grads)


@cache
def differences(name: str) -> dict:
    case = CASES[name]
    _, params, world = make(case.family, case.rule, case.frozen)
    return slopes(lambda p: case.plain(p, world), params)


@pytest.mark.parametrize("name", [n for n in CASES if n != "warp"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rule_equals_central_differences(name, engine):
    check_slopes(ours(CASES[name], engine).grads, differences(name))


@pytest.mark.parametrize("engine", ENGINES)
def test_warp_layers_equal_central_differences_at_points_held_constant(engine):
    """The points are visited once, at the warp as it is; then the warp alone moves, in one step from each of them. The
    rest: the ordinary objective with the warp held."""
    grads, case = ours(CASES["warp"], engine).grads, CASES["warp"]
    _, params, world = make(case.family, case.rule, case.frozen)
    names, visited = [*FIRST, *HEAD], []

    def step(q: Params) -> Params:
        seen = {**q, **{n: q[w] for n, w in zip(SECOND, WARP, strict=True)}}
        g = partial(world.support, seen, names)
        return {**seen, **{n: seen[n] - rate_of(n) * g[n] for n in names}}

    at = params
    for _ in range(STEPS):
        visited.append({n: at[n] for n in names})
        at = step(at)

    def of_warp(moved: Params) -> Tensor:
        points = zip((1.0, 0.5, 2.0), visited, strict=True)
        return sum(weight * world.query(step({**params, **moved, **point})) for weight, point in points)

    def of_rest(moved: Params) -> Tensor:
        at = {**params, **moved}
        for _ in range(STEPS):
            at = step(at)
        return world.query(at)

    check_slopes(grads, slopes(of_warp, {n: params[n] for n in WARP}))
    rest = {n: p for n, p in params.items() if n not in WARP and n not in SECOND}
    check_slopes(grads, slopes(of_rest, rest))
    assert not any(grads[n].any() for n in SECOND)  # the warp stands in their place


@dataclass(frozen=True)
class Descent(InnerRule):
    """SGD to the letter, but not by the inherited update: it takes the way of any rule."""

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        g = grad(fast)
        return {n: v - self.rates(fast)[n] * g[n] for n, v in fast.items()}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("family", ["vector", "attention"])
@pytest.mark.parametrize("engine", ENGINES)
def test_sgd_by_the_way_of_any_rule_is_sgd(order, size, family, engine):
    """The shortcut of SGD (its transpose is known) changes nothing."""

    def of(rule: InnerRule) -> MetaGradient:
        problem, params, world = make(family, rule)
        problem.micro_batch = size
        return meta_gradient(params, world.episode, problem, Method(STEPS, rule, GAMMA, order), engine)

    general, short = of(Descent(RATE, HEAD_RATE)), of(InnerRule(RATE, HEAD_RATE))
    check_equal(general.grads, short.grads, rel=1e-13)
    assert general.terms["loss"] == short.terms["loss"]


@dataclass(frozen=True)
class EarlyStart(InnerRule):
    """Multi-step loss on the way of SGD; the weights are a function of the number of the meta-step."""

    def terms(self, meta_step: int, steps: int) -> tuple[Term, ...]:
        return (Term(WEIGHTS if meta_step < 10 else (0.0, 0.0, 1.0)),)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("meta_step", [9, 10])
@pytest.mark.parametrize("engine", ENGINES)
def test_multi_step_losses_follow_their_schedule(order, meta_step, engine):
    """Of first order too, where each loss passes straight to the start."""
    problem, params, world = make("vector", rule := EarlyStart(RATE, HEAD_RATE))
    method = Method(STEPS, rule, GAMMA, order)
    got = meta_gradient(params, world.episode, problem, method, engine, meta_step=meta_step)

    def plain(p: Params) -> Tensor:
        losses = []
        for _ in range(STEPS):
            g = partial(world.support, p, ADAPTS, order)
            p = {**p, **{n: p[n] - rate_of(n) * g[n] for n in ADAPTS}}
            losses.append(world.query(p))
        return sum(w * loss for w, loss in zip(WEIGHTS, losses, strict=True)) if meta_step < 10 else losses[-1]

    value, grads = total_gradient(plain, params)
    assert got.terms["loss"].item() == pytest.approx(value, rel=1e-13)
    check_equal(got.grads, grads)


@dataclass(frozen=True)
class LateAdam(Adam):
    """Adam, judged after each step."""

    def terms(self, meta_step: int, steps: int) -> tuple[Term, ...]:
        return (Term(WEIGHTS),)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_state_and_losses_on_the_way_go_together(size, engine):
    """A loss on the way does not see the moments: they reach a later one through the steps between."""
    problem, params, world = make("vector", rule := LateAdam(RATE / 5, HEAD_RATE / 5, eps=1e-3))
    problem.micro_batch = size
    got = meta_gradient(params, world.episode, problem, Method(STEPS, rule, GAMMA), engine)

    def plain(p: Params) -> Tensor:
        m, v, total = dict.fromkeys(ADAPTS, 0.0), dict.fromkeys(ADAPTS, 0.0), 0.0
        for k in range(STEPS):
            g = partial(world.support, p, ADAPTS)
            m = {n: 0.9 * m[n] + 0.1 * g[n] for n in ADAPTS}
            v = {n: 0.999 * v[n] + 0.001 * g[n] ** 2 for n in ADAPTS}
            steps = {n: m[n] / (1 - 0.9 ** (k + 1)) / (v[n] / (1 - 0.999 ** (k + 1)) + 1e-3).sqrt() for n in ADAPTS}
            p = {**p, **{n: p[n] - rate_of(n) / 5 * steps[n] for n in ADAPTS}}
            total = total + WEIGHTS[k] * world.query(p)
        return total

    value, grads = total_gradient(plain, params)
    assert got.terms["loss"].item() == pytest.approx(value, rel=1e-13)
    check_equal(got.grads, grads)
