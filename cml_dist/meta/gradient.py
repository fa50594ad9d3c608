"""The meta-gradient: a pure function of parameters and one episode, and two engines that compute it.

Read downwards: :func:`meta_gradient` runs the inner loop, takes the gradient of the query losses along it, and pulls it
back to the start. An engine is how that is done; the value is the same to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cml_dist.meta.inner import Cotangent, InnerLoop, Point, accumulate
from cml_dist.meta.problem import Problem, detached
from cml_dist.meta.rule import Method, Term, part_of
from cml_dist.types import BODY, Episode, Learner, Params


@dataclass(frozen=True)
class MetaGradient:
    """The meta-gradient of one episode.

    Attributes:
        grads: d (outer loss) / d (meta-parameter) by canonical name; no graph hangs on them.
        terms: scalars of the episode: ``loss`` (what is minimised), ``outer_loss``, ``score``; with a co-learner
            ``colearner_loss``, ``colearner_score``; on request ``gradient_cosine``. Of sub-networks ``loss`` alone has
            a share; the others are the whole network's.
    """

    grads: Params
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Engine:
    """How a meta-gradient is computed.

    Attributes:
        name: ``graph`` or ``adjoint``.
        trajectory: of ``adjoint``, which points of the inner loop are kept: ``all``, or ``sqrt``: about every
            sqrt(K)-th, and those between are computed anew.
        device: of ``adjoint``, where they are kept (e.g. the CPU); None: where they are.
    """

    name: str = "graph"
    trajectory: str = "all"
    device: torch.device | None = None


def meta_gradient(
    params: Params,
    episode: Episode,
    problem: Problem,
    method: Method,
    engine: Engine | str,
    *,
    diagnose: bool = False,
    meta_step: int = 0,
) -> MetaGradient:
    """Gradient of L(f_m(psi', theta'); Q) + gamma * L(f_c(psi', phi); Q) through the inner loop.

    Args:
        params: all meta-parameters by canonical name.
        episode: prepared by its domain, on the device of ``params``.
        problem: the network's loss; its ``micro_batch`` bounds what passes through the network at once.
        engine: how it is computed.
        diagnose: also report the cosine in psi between the co-learner's and the meta-learner's meta-gradients (of the
            rule's first term).
        meta_step: the number of the meta-step, for methods with a schedule.

    Cost: with K inner steps, ``graph`` K forward, backward and double backward passes over the support set and memory
    for all K graphs; ``adjoint`` K forward and backward passes more, and memory for one graph of a micro-batch and K
    copies of what adapts (``sqrt``: about 2 sqrt(K), and K forward and backward passes more again). Both add one
    forward and backward pass over the query set; ``diagnose`` computes the co-learner's meta-gradient besides: all of
    it again, and so does each sub-network of ``method.augment``.
    Collective: none.
    Source: CML (UAI 2024), eq. 5-7.
    """
    engine, method = Engine(engine) if isinstance(engine, str) else engine, method.at(meta_step)
    loop, weights = InnerLoop(params, episode, problem, method), {"meta": 1.0, "co": method.gamma}
    grads, terms = _objective(loop, weights, engine, meta_step)
    # A body that is all frozen has no gradient.
    if diagnose and len(problem.learners) == 2 and any(part_of(n) == BODY for n in grads):
        co, _ = _objective(loop, {"meta": 0.0, "co": 1.0}, engine, meta_step, first_alone=True)
        first = loop.rule.terms(meta_step, loop.steps)[0]
        terms["gradient_cosine"] = _cosine_in_body({n: grads[n] for n in grads if first.moves(n)}, co, method.gamma)
    if (augment := method.augment) is not None:
        for masks in augment.masks(loop.seen(), loop.slopes, episode):
            pruned = InnerLoop(params, episode, problem, method, masks=masks)
            more, told = _objective(pruned, weights, engine, meta_step)
            accumulate(grads, {n: g.mul_(augment.weight) for n, g in more.items()}, owned=True)
            terms["loss"] = terms["loss"] + augment.weight * told["loss"]
            del pruned, more
    return MetaGradient({n: grads[n] if n in grads else torch.zeros_like(p) for n, p in params.items()}, terms)


def learners_gradients(
    params: Params,
    episode: Episode,
    problem: Problem,
    method: Method,
    engine: Engine | str,
    learners: Sequence[Learner],
    *,
    meta_step: int = 0,
) -> dict[Learner, Params]:
    """The meta-gradient of each learner's own query loss, both pulled back through the method's inner loop.

    Of ``meta`` it is g, and of ``co`` gbar, without gamma, in the paper's descent condition <g_j, gbar_j> > 0 in each
    layer j. As in the trainer's diagnosis they are of the rule's first term, and of the whole network.

    Args:
        params, episode, problem, method, engine, meta_step: as of :func:`meta_gradient`.
        learners: whose; of those that the network has.

    Returns:
        By learner, and by name of what the gradient reaches.

    Cost: :func:`meta_gradient` for each learner. Collective: none.
    Source: CML (UAI 2024).
    """
    engine = Engine(engine) if isinstance(engine, str) else engine
    loop, found = InnerLoop(params, episode, problem, method.at(meta_step)), {}
    for learner in learners:
        weights = {one: float(one == learner) for one in problem.learners}
        found[learner], _ = _objective(loop, weights, engine, meta_step, first_alone=True)
    return found


def _objective(
    loop: InnerLoop, weights: Mapping[Learner, float], engine: Engine, meta_step: int, *, first_alone: bool = False
) -> tuple[Params, dict[str, Tensor]]:
    """Gradient of all terms of the outer loss by meta-parameter, and what they are.

    Args:
        weights: of each learner's query loss.
        first_alone: of the rule's first term alone, without its penalty (for the diagnosis).
    """
    total: Params = {}
    told: dict[str, Tensor] = {}
    for number, term in enumerate(loop.rule.terms(meta_step, loop.steps)[: 1 if first_alone else None]):
        back = Cotangent()
        if term.horizon is not None:
            terms = one_step(loop, term, weights, back)
        elif engine.name == "graph" and loop.order == 2:
            terms = graph(loop, term, weights, back, penalty=number == 0 and not first_alone)
        else:
            terms = adjoint(loop, term, weights, back, engine, penalty=number == 0 and not first_alone)
        accumulate(total, {n: g for n, g in back.meta.items() if term.moves(n)}, owned=True)
        told = {**terms, **told, "loss": terms["loss"] + told["loss"] if told else terms["loss"]}
    return total, told


def _cosine_in_body(total: Params, co: Params, gamma: float) -> Tensor:
    """Cosine in psi of the meta-learner's meta-gradient (total - gamma * co) and the co-learner's."""
    dot = meta = other = next(iter(total.values())).new_zeros(())
    for name in (n for n in total if part_of(n) == BODY):
        g_co = co.get(name, torch.zeros_like(total[name]))
        g_meta = total[name] - gamma * g_co
        dot, meta, other = dot + (g_meta * g_co).sum(), meta + g_meta.square().sum(), other + g_co.square().sum()
    return dot / (meta.sqrt() * other.sqrt()).clamp_min(1e-8)


# --------------------------------------------------------------------------- engines
# An engine puts the gradient of a term of the outer loss by meta-parameter into ``back.meta``, and returns its values.


def graph(
    loop: InnerLoop, term: Term, weights: Mapping[Learner, float], back: Cotangent, *, penalty: bool = True
) -> dict[str, Tensor]:
    """Autograd through the unrolled loop: the oracle, and the fastest where K graphs fit into memory."""
    start = Point(loop.meta, loop.fast, loop.const).leaves()
    fast = dict(start.fast)
    queries = _Queries(loop, term, weights)
    values, vectors = [], []
    for k in _steps(loop):
        if k >= 0:
            fast = loop.move(Point(start.meta, fast, start.const), k, differentiable=True)
        at = Cotangent(back.meta, {}, back.const)  # what the queries see directly adds up in back
        queries.after(k, detached(fast), at, penalty)
        reached = [n for n in at.fast if fast[n].requires_grad]
        values += [fast[n] for n in reached]
        vectors += [at.fast[n] for n in reached]
    del fast, at
    if values:
        back.add(start.named(torch.autograd.grad(values, start.tensors(), vectors, allow_unused=True)))
    loop.pull_back_start(back)
    return queries.told


def adjoint(
    loop: InnerLoop,
    term: Term,
    weights: Mapping[Learner, float],
    back: Cotangent,
    engine: Engine,
    *,
    penalty: bool = True,
) -> dict[str, Tensor]:
    """Keep fast_0..fast_K as values; then, backwards, recompute one step at a time and pull through it alone.

    For k = K-1..0: lambda_k = (d fast_{k+1} / d fast_k)^T lambda_{k+1}, which for SGD is lambda - H_k alpha lambda. At
    first order the same sweep takes the inner gradients as constants.
    """
    queries = _Queries(loop, term, weights)
    if loop.order == 1 and loop.rule.is_sgd:  # each step is the identity: nothing to keep, and nothing to pull through
        fast = loop.fast
        for k in _steps(loop):
            fast = loop.step(fast, k) if k >= 0 else fast
            queries.after(k, fast, back, penalty)
    else:
        path = Trajectory(loop, engine)
        fast = path.end()
        queries.after(loop.steps - 1, fast, back, penalty)
        for k, fast in path.backwards():
            unreached = [n for n in fast if n not in back.fast]  # by any query after this point
            back.fast.update({n: torch.zeros_like(fast[n]) for n in unreached})
            loop.pull_back_step(fast, k, back)
            if k > 0:
                queries.after(k - 1, fast, back, penalty)
    loop.pull_back_start(back)
    return queries.told


def one_step(loop: InnerLoop, term: Term, weights: Mapping[Learner, float], back: Cotangent) -> dict[str, Tensor]:
    """Each visited point held constant: the query loss after a step, pulled back through that step alone (WarpGrad)."""
    queries = _Queries(loop, term, weights)
    fast = loop.fast
    for k in range(loop.steps):
        after = loop.step(fast, k)
        at = Cotangent(back.meta, {n: torch.zeros_like(value) for n, value in after.items()})
        queries.after(k, after, at, False)
        if term.weights[k]:
            loop.pull_back_step(fast, k, at)  # what reaches the visited point itself stops there
        fast = after
    return queries.told


class Trajectory:
    """The points fast_0 .. fast_{K-1} of an inner loop, run once forwards, and given back from the last to the first.

    With ``sqrt`` about every sqrt(K)-th is kept, and a stretch between two is computed anew when it is its turn: about
    2 sqrt(K) copies in memory for one more forward sweep, and the same values to the bit.
    """

    def __init__(self, loop: InnerLoop, engine: Engine) -> None:
        self._loop, self._device = loop, engine.device
        self._stretch = _stretch(loop.steps, engine.trajectory)
        self._kept: list[tuple[int, Params]] = []

    def end(self) -> Params:
        """Run the loop; returns fast_K."""
        fast = self._loop.fast
        for k in range(self._loop.steps):
            if k % self._stretch == 0:
                self._kept.append((k, self._away(fast)))
            fast = self._loop.step(fast, k)
        return fast

    def backwards(self) -> Iterator[tuple[int, Params]]:
        """(k, fast_k) for k = K-1 .. 0. No more is kept of a point that was given."""
        while self._kept:
            first, fast = self._kept.pop()
            points = [(first, fast)]
            for k in range(first, min(first + self._stretch, self._loop.steps) - 1):
                fast = self._loop.step(self._here(fast), k)
                points.append((k + 1, self._away(fast)))
            del fast
            while points:
                k, point = points.pop()
                yield k, self._here(point)
                del point

    def _away(self, fast: Params) -> Params:
        return fast if self._device is None else {n: value.to(self._device) for n, value in fast.items()}

    def _here(self, fast: Params) -> Params:
        device = next(iter(self._loop.meta.values())).device
        return {n: value.to(device) for n, value in fast.items()}


def _stretch(steps: int, trajectory: str) -> int:
    """Steps between two points that are kept; for ``sqrt`` the square root, rounded up."""
    return math.isqrt(max(steps - 1, 0)) + 1 if trajectory == "sqrt" else 1


def points_held(steps: int, trajectory: str) -> int:
    """Points of the inner loop that :class:`Trajectory` holds at most."""
    stretch = _stretch(steps, trajectory)
    return steps if stretch == 1 else -(-steps // stretch) - 1 + min(stretch, steps)


class _Queries:
    """The query losses of a term along the inner loop: their weighted sum, and what the last of them tells."""

    def __init__(self, loop: InnerLoop, term: Term, weights: Mapping[Learner, float]) -> None:
        self._loop, self._term, self._weights = loop, term, weights
        self._tells = max((k for k, weight in enumerate(term.weights) if weight), default=0)
        self.told = {"loss": next(iter(loop.meta.values())).new_zeros(())}

    def after(self, k: int, fast: Params, into: Cotangent, penalty: bool) -> None:
        """Add the gradient of the query loss after step ``k`` (-1: before any), where it counts, and of the penalty."""
        weight, row = self._term.weights[max(k, 0)], max(k, 0)
        if weight:
            weights = {learner: weight * w for learner, w in self._weights.items()}
            terms = self._loop.query(fast, row, weights, into)
            self.told["loss"] = self.told["loss"] + terms["loss"]
            if row == self._tells:
                self.told = {**terms, **self.told}
        if k == self._loop.steps - 1 and penalty and (value := self._loop.add_penalty(fast, into)) is not None:
            self.told["loss"] = self.told["loss"] + value


def _steps(loop: InnerLoop) -> range:
    """0 .. K-1, or -1 alone where there is no step: after it comes the query all the same."""
    return range(loop.steps) if loop.steps else range(-1, 0)
