"""Every method, head and kind of co-learner against its equation written out in plain torch, in float64.

The left side is the package's meta-gradient, of both engines. The right side is written here: the network as matrix
products, the inner loop as a loop, heads in closed form; once differentiated by autograd, and once not differentiated
at all, by central differences in each tensor that is learned (phi and ``rule.*`` too).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
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

from cml_dist.meta.gradient import MetaGradient, meta_gradient
from cml_dist.meta.inner import adapt
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import InnerRule, Method
from cml_dist.methods.inner_optim import Adam, Momentum
from cml_dist.methods.maml_pp import MamlPlusPlus
from cml_dist.methods.meta_sgd import MetaSgd
from cml_dist.methods.sharp import SharpSgd
from cml_dist.nets.heads import build_head
from cml_dist.nets.network import CmlNet
from cml_dist.nets.partition import freeze
from cml_dist.types import BODY, COLEARNER, HEAD, Episode, Params

RATES = {"body": 0.4, "head": 0.3, "colearner": 0.3}
GAMMA, MOMENTUM, BETAS, ROWS = 0.7, 0.8, (0.8, 0.95), 2
ENGINES = ["graph", "adjoint"]
LAYERS = [f"{layer}.{kind}" for layer in ("body.layers.0", "body.layers.2", "head") for kind in ("weight", "bias")]

# --------------------------------------------------------------------------- the methods' updates, by hand
# (what the network is, gradient of the support loss, state, step) -> what has moved; the state is changed in place.

Update = Callable[[Params, Params, Params, int], Params]


def rate_of(name: str) -> float:
    return RATES[name.split(".")[0]]


def descend(p: Params, g: Params, state: Params, k: int) -> Params:
    """MAML, ANIL, BOIL: p <- p - rate g."""
    return {n: p[n] - rate_of(n) * g[n] for n in g}


def descend_by_learned_rates(p: Params, g: Params, state: Params, k: int) -> Params:
    """Meta-SGD: p <- p - rate * g, element by element; the classes of a started head share theirs."""
    return {n: p[n] - p[f"rule.lr.{n}"] * g[n] for n in g}


def descend_by_rates_a_step(p: Params, g: Params, state: Params, k: int) -> Params:
    """MAML++: p <- p - rate_k * g, a rate a tensor; steps after the last row go on with it."""
    return {n: p[n] - p[f"rule.lr.{n}"][min(k, ROWS - 1)] * g[n] for n in g}


def descend_with_momentum(p: Params, g: Params, state: Params, k: int) -> Params:
    """m <- mu m + g; p <- p - rate m."""
    state.update({n: MOMENTUM * state.get(n, 0.0) + g[n] for n in g})
    return {n: p[n] - rate_of(n) * state[n] for n in g}


def descend_by_adam(eps: float) -> Update:
    """Kingma and Ba, algorithm 1, with the root of v and eps together."""

    def update(p: Params, g: Params, state: Params, k: int) -> Params:
        moved = {}
        for n in g:
            state[f"m.{n}"] = BETAS[0] * state.get(f"m.{n}", 0.0) + (1 - BETAS[0]) * g[n]
            state[f"v.{n}"] = BETAS[1] * state.get(f"v.{n}", 0.0) + (1 - BETAS[1]) * g[n] ** 2
            m, v = state[f"m.{n}"] / (1 - BETAS[0] ** (k + 1)), state[f"v.{n}"] / (1 - BETAS[1] ** (k + 1))
            moved[n] = p[n] - 0.2 * rate_of(n) * m / torch.sqrt(v + eps)
        return moved

    return update


@dataclass(frozen=True)
class Case:
    """A rule of the package, and the same by hand.

    Attributes:
        parts: what adapts, by hand.
        both_adapt: the paper's control of two heads that both adapt.
        radius, detached: each step takes its gradient at the end of an ascent of this length (Sharp-MAML's lower
            level), which may be taken as a constant.
    """

    rule: InnerRule
    by_hand: Update
    parts: tuple[str, ...] = (BODY, HEAD)
    both_adapt: bool = False
    radius: float = 0.0
    detached: bool = False


LR = (RATES["body"], RATES["head"])
SLOW = (0.2 * RATES["body"], 0.2 * RATES["head"])
EVERYTHING = (BODY, HEAD, COLEARNER)
CASES = {
    "maml": Case(InnerRule(*LR), descend),
    "anil": Case(InnerRule(*LR, frozenset(LAYERS[4:])), descend, (HEAD,)),
    "boil": Case(InnerRule(*LR, frozenset(LAYERS[:4])), descend, (BODY,)),
    "no_head_rate": Case(InnerRule(RATES["body"], 0.0), descend, (BODY,)),
    "meta_sgd": Case(MetaSgd(*LR), descend_by_learned_rates),
    "meta_sgd_on_the_body": Case(MetaSgd(*LR, frozenset(LAYERS[:4])), descend_by_learned_rates, (BODY,)),
    "maml_pp": Case(MamlPlusPlus(*LR, steps=ROWS), descend_by_rates_a_step),
    "sharp": Case(SharpSgd(*LR, radius=0.3), descend, radius=0.3),
    "sharp_detached": Case(SharpSgd(*LR, radius=0.3, exact=False), descend, radius=0.3, detached=True),
    "momentum": Case(Momentum(*LR, momentum=MOMENTUM), descend_with_momentum),
    "adam": Case(Adam(*SLOW, betas=BETAS), descend_by_adam(1e-8)),
    "smooth_adam": Case(Adam(*SLOW, betas=BETAS, eps=1e-3), descend_by_adam(1e-3)),
    "both_adapt": Case(InnerRule(*LR, parts=EVERYTHING), descend, EVERYTHING, True),
    "both_adapt_meta_sgd": Case(MetaSgd(*LR, parts=EVERYTHING), descend_by_learned_rates, EVERYTHING, True),
}


# --------------------------------------------------------------------------- heads at their start, by hand


def started(p: Params, head: str, episode: Episode) -> Params:
    """The head of an episode, in closed form: a linear layer of weight ``[ways, D]`` and bias ``[ways]``."""
    x, y, ways = episode.support.inputs, episode.support.targets, episode.ways
    if head == "linear":
        return {}
    if head == "shared":
        rows = [p["head.weight"][0]] * ways, [p["head.bias"][0]] * ways
        return {"head.weight": torch.stack(rows[0]), "head.bias": torch.stack(rows[1])}
    features = features_of(p, x)
    if head == "centroid":
        means = torch.stack([features[y == c].mean(0) for c in range(ways)])
        return {"head.weight": 2 * means, "head.bias": -(means**2).sum(1)}
    # Ridge regression in its primal form, D equations; the package solves as many as there are examples.
    one_hot = torch.stack([(y == c).double() for c in range(ways)], 1)
    normal = features.T @ features + torch.exp(p["head.log_lambda"]) * torch.eye(features.shape[1]).double()
    weight = torch.linalg.inv(normal) @ features.T @ one_hot
    return {"head.weight": p["head.scale"] * weight.T, "head.bias": torch.cat([p["head.offset"]] * ways)}


# --------------------------------------------------------------------------- an episode's objective, by hand


@dataclass(frozen=True)
class Setting:
    """What a test is of; ``co`` is ``none``, ``dense``, ``untrained`` (frozen phi) or ``prototypes``."""

    case: str = "maml"
    steps: int = 3
    co: str = "dense"
    head: str = "linear"
    order: int = 2
    ways: int = 3

    def __str__(self) -> str:
        return f"{self.case}-{self.steps}-{self.co}-{self.head}-order{self.order}"

    @property
    def method(self) -> Method:
        case = CASES[self.case]
        return Method(self.steps, case.rule, 0.0 if self.co == "none" else GAMMA, self.order, case.both_adapt)


def make(setting: Setting) -> tuple[Problem, Params, Params, Episode]:
    """(problem, meta-parameters, constants, episode); what a rule or head learns has no two equal values."""
    net = make_net("vector", colearner=setting.co != "none")
    torch.manual_seed(5)
    if setting.head != "linear":
        net.head = build_head(setting.head, 6, 3).double()
    if setting.co == "prototypes":
        net = CmlNet(net.body, net.head, nn.Linear(6, 4).double(), prototypes=True)
    if setting.co == "untrained":
        freeze(net, [n for n, _ in net.named_parameters() if not n.startswith("colearner.")], colearner=True)
    net.add_rule(CASES[setting.case].rule.init(net.adaptable()))
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    for name in params:
        if name.startswith("rule.") or name in ("head.log_lambda", "head.scale", "head.offset"):
            params[name] = params[name] + 0.2 * torch.randn_like(params[name])
    buffers = dict(net.named_buffers())
    return Problem(net, cross_entropy, accuracy, buffers), params, buffers, uneven_episode(setting.ways)


def adapted(p: Params, episode: Episode, setting: Setting) -> Params:
    """What the network is after the inner loop, by hand."""
    case, state = CASES[setting.case], {}
    x, y = episode.support.inputs, episode.support.targets

    def support_loss(q: Params) -> Tensor:
        loss = cross_entropy(logits_of(q, x), y)
        return loss + GAMMA * cross_entropy(colearner_of(q, x), y) if case.both_adapt else loss

    p = {**p, **started(p, setting.head, episode)}
    names = [n for n in p if n.endswith(("weight", "bias")) and n.split(".")[0] in case.parts]
    for k in range(setting.steps):
        g = partial(support_loss, p, names, setting.order)
        if case.radius:
            up = {n: v.detach() if case.detached else v for n, v in g.items()}
            norm = torch.cat([v.flatten() for v in up.values()]).norm() + 1e-12
            g = partial(support_loss, {**p, **{n: p[n] + case.radius * up[n] / norm for n in up}}, names, setting.order)
        p = {**p, **case.by_hand(p, g, state, k)}
    return p


def objective(p: Params, episode: Episode, setting: Setting) -> Tensor:
    """L(f_m(psi', theta'); Q) + gamma L(f_c(psi', phi); Q), by hand (paper, eq. 5 and 6)."""
    p = adapted(p, episode, setting)
    x, y = episode.query.inputs, episode.query.targets
    loss = cross_entropy(logits_of(p, x), y)
    if setting.co in ("dense", "untrained"):
        loss = loss + GAMMA * cross_entropy(colearner_of(p, x), y)
    if setting.co == "prototypes":
        own, labels = colearner_of(p, episode.support.inputs), episode.support.targets
        distances = [((colearner_of(p, x) - own[labels == c].mean(0)) ** 2).sum(1) for c in range(episode.ways)]
        loss = loss + GAMMA * cross_entropy(-torch.stack(distances, 1), y)
    return loss


def ours(setting: Setting, engine: str, micro_batch: int | None = None) -> MetaGradient:
    problem, params, _, episode = make(setting)
    problem.micro_batch = micro_batch
    return meta_gradient(params, episode, problem, setting.method, engine)


@cache
def by_hand(setting: Setting) -> tuple[float, Params]:
    _, params, constants, episode = make(setting)
    return total_gradient(lambda p: objective({**constants, **p}, episode, setting), params)


@cache
def differences(setting: Setting) -> dict[str, tuple[Tensor, float]]:
    _, params, constants, episode = make(setting)
    return slopes(lambda p: objective({**constants, **p}, episode, setting), params)


def check_by_hand(setting: Setting, engine: str, micro_batch: int | None = None) -> None:
    got, (value, grads) = ours(setting, engine, micro_batch), by_hand(setting)
    assert got.terms["loss"].item() == pytest.approx(value, rel=1e-13)
    check_equal(got.grads, grads)


BOTH = [name for name, case in CASES.items() if case.both_adapt]
ALONE = [name for name in CASES if name not in BOTH]
OF_METHODS = [
    *(Setting(c, k, co, order=o) for c in ALONE for k in (1, 3) for co in ("none", "dense") for o in (1, 2)),
    *(Setting(c, k, "untrained", order=o) for c in ("maml", "boil") for k in (1, 3) for o in (1, 2)),
    *(Setting(c, k, "dense", order=o) for c in BOTH for k in (1, 3) for o in (1, 2)),
]
OF_HEADS = [
    Setting(c, k, "dense", head, order=o)
    for head in ("shared", "centroid", "ridge")
    for c in ("maml", "anil", "boil", "meta_sgd", "maml_pp", "smooth_adam")
    for k, o in ((0, 2), (1, 2), (3, 2), (3, 1))
    if k or c in ("maml", "meta_sgd")
]
OF_PROTOTYPES = [
    Setting(c, k, "prototypes", head, order=o)
    for c, head in (("maml", "linear"), ("anil", "linear"), ("boil", "shared"), ("maml", "ridge"), ("adam", "linear"))
    for k, o in ((1, 2), (3, 2), (3, 1))
]


@pytest.mark.parametrize("setting", [*OF_METHODS, *OF_HEADS, *OF_PROTOTYPES], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_meta_gradient_equals_the_equation_written_out(setting, engine):
    """First order too: there the written-out loop takes the inner gradients as constants."""
    check_by_hand(setting, engine)


# By sqrt(v + 1e-8) a step bends within 1e-4 of a gradient of zero, which a difference of 1e-5 is too coarse for.
# A detached ascent is not the derivative of anything.
ROUGH = ("adam", "sharp_detached")
ALL = [*OF_METHODS, *OF_HEADS, *OF_PROTOTYPES]
SMOOTH = [s for s in ALL if s.order == 2 and s.case not in ROUGH and s.co != "none"]


@pytest.mark.parametrize("setting", SMOOTH, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_meta_gradient_equals_central_differences_in_all_that_is_learned(setting, engine):
    """Of the written-out objective, in each tensor: body, head's own, co-learner, learned rates."""
    check_slopes(ours(setting, engine).grads, differences(setting))


@pytest.mark.parametrize("case", ["maml", "boil", "meta_sgd"])
@pytest.mark.parametrize("head", ["linear", "shared", "centroid", "ridge"])
def test_a_test_adapts_as_training_does(case, head):
    """What an episode of a test is scored with equals the written-out inner loop."""
    setting = Setting(case, 3, "dense", head)
    problem, params, constants, episode = make(setting)
    expected = adapted({**constants, **params}, episode, setting)
    got = adapt(params, episode, problem, setting.method)
    check_equal({n: got[n] for n in LAYERS}, {n: expected[n] for n in LAYERS})


# --------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_first_order_meta_sgd_learns_its_rates_by_minus_gradients_times_gradient(steps, engine):
    """With constant g_k: d L / d rate = -(g_0 + .. + g_{K-1}) * v and d L / d fast_0 = v, with v the gradient at the
    end of the path (Li et al., eq. 5, without second derivatives)."""
    setting = Setting("meta_sgd", steps, "dense", order=1)
    _, p, _, episode = make(setting)
    support, query = episode.support, episode.query
    got, at, travelled = ours(setting, engine).grads, p, dict.fromkeys(LAYERS, 0.0)
    for _ in range(steps):
        g = partial(lambda q: cross_entropy(logits_of(q, support.inputs), support.targets), at, LAYERS)
        at = {**at, **{n: at[n] - p[f"rule.lr.{n}"] * g[n] for n in LAYERS}}
        travelled = {n: travelled[n] + g[n] for n in LAYERS}

    def query_loss(q: Params) -> Tensor:
        of_co = cross_entropy(colearner_of(q, query.inputs), query.targets)
        return cross_entropy(logits_of(q, query.inputs), query.targets) + GAMMA * of_co

    v = partial(query_loss, at, LAYERS)
    check_equal({n: got[n] for n in LAYERS}, v)
    check_equal({n: got[f"rule.lr.{n}"] for n in LAYERS}, {n: -travelled[n] * v[n] for n in LAYERS})


@pytest.mark.parametrize("ways", [3, 5])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_centroid_head_without_steps_is_a_prototypical_network(ways, engine):
    """Softmax of minus squared distances to the classes' mean features (Snell et al.), for any number of classes."""
    setting = Setting("maml", 0, "none", "centroid", ways=ways)
    _, params, _, episode = make(setting)
    support, query = episode.support, episode.query

    def loss(p: Params) -> Tensor:
        own, asked = features_of(p, support.inputs), features_of(p, query.inputs)
        means = [own[support.targets == c].mean(0) for c in range(ways)]
        minus = -torch.stack([((asked - mean) ** 2).sum(1) for mean in means], 1)
        right = minus[range(len(asked)), query.targets]
        return (torch.logsumexp(minus, 1) - right).mean()

    got = ours(setting, engine)
    value, grads = total_gradient(loss, params)
    assert got.terms["loss"].item() == pytest.approx(value, rel=1e-13)
    check_equal(got.grads, grads)


@pytest.mark.parametrize("ways", [3, 5])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_ridge_head_without_steps_is_r2d2(ways, engine):
    """scale * X_Q (X^T X + lambda)^-1 X^T Y + offset (Bertinetto et al., eq. 6), for any number of classes."""
    setting = Setting("maml", 0, "none", "ridge", ways=ways)
    _, params, _, episode = make(setting)
    support, query = episode.support, episode.query

    def loss(p: Params) -> Tensor:
        x, asked = features_of(p, support.inputs), features_of(p, query.inputs)
        y = torch.nn.functional.one_hot(support.targets, ways).double()
        normal = x.T @ x + torch.exp(p["head.log_lambda"]) * torch.eye(6).double()
        outputs = p["head.scale"] * asked @ torch.linalg.solve(normal, x.T @ y) + p["head.offset"]
        return cross_entropy(outputs, query.targets)

    got = ours(setting, engine)
    value, grads = total_gradient(loss, params)
    assert got.terms["loss"].item() == pytest.approx(value, rel=1e-13)
    check_equal(got.grads, grads)


@pytest.mark.parametrize("ways", [2, 5])
@pytest.mark.parametrize("case", ["maml", "boil", "meta_sgd"])
@pytest.mark.parametrize("head", ["shared", "centroid", "ridge"])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_episode_may_have_any_number_of_classes(ways, case, head, engine):
    """The network was built for 3; with the prototypical co-learner, whose number of classes is free too."""
    check_by_hand(Setting(case, 3, "prototypes", head, ways=ways), engine)


@pytest.mark.parametrize("case", ["maml", "boil", "meta_sgd"])
@pytest.mark.parametrize("head", ["shared", "centroid", "ridge"])
def test_no_order_of_the_labels_is_preferred(case, head):
    """Started heads treat labels alike: other names for the classes change no meta-gradient."""
    setting = Setting(case, 3, "prototypes", head)
    problem, params, _, episode = make(setting)
    order = torch.tensor([2, 0, 1])
    support, query = (replace(b, targets=order[b.targets]) for b in (episode.support, episode.query))
    renamed = replace(episode, support=support, query=query)
    check_equal(
        meta_gradient(params, renamed, problem, setting.method, "adjoint").grads,
        meta_gradient(params, episode, problem, setting.method, "adjoint").grads,
    )


# --------------------------------------------------------------------------- micro-batches


IN_PIECES = [
    *(Setting(c, 3, "dense", order=o) for c in ("meta_sgd", "maml_pp", "sharp", "momentum") for o in (1, 2)),
    *(Setting(c, 3, "dense", order=o) for c in ("sharp_detached", "smooth_adam") for o in (1, 2)),
    *(Setting(c, 3, "dense", h, order=o) for h in ("centroid", "ridge") for c in ("maml", "boil") for o in (1, 2)),
    *(Setting(c, 3, "dense", h) for h in ("centroid", "ridge") for c in ("meta_sgd", "smooth_adam")),
    *(Setting(c, 3, "prototypes", h) for c, h in (("maml", "linear"), ("boil", "centroid"), ("smooth_adam", "ridge"))),
    Setting("both_adapt", 3, "dense"),
    Setting("maml", 0, "prototypes", "centroid"),
]
PIECES = [(s, size) for s in IN_PIECES for size in ((1, 2, 4) if s.co == "prototypes" else (1, 4))]


@pytest.mark.parametrize(("setting", "size"), PIECES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_give_the_same_meta_gradient(setting, size, engine):
    """Of 6 support and 9 query examples, where 4 leaves smaller last pieces; against the written-out whole."""
    got, (value, grads) = ours(setting, engine, size), by_hand(setting)
    check_equal(got.grads, grads)
    assert got.terms["loss"].item() == pytest.approx(value, rel=1e-13)
    whole = {n: t.item() for n, t in ours(setting, engine).terms.items()}
    assert {n: t.item() for n, t in got.terms.items()} == pytest.approx(whole, rel=1e-12)
