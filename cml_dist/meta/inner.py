"""The inner loop of an episode: its start, a step, the query after it, and the transposes of all three.

The only place that says so, for training and testing alike. Values carry no graph; a graph lives as long as one step,
or one micro-batch of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cml_dist.meta.problem import Pass, Problem, class_means, detached
from cml_dist.meta.rule import GradFn, Method, part_of
from cml_dist.meta.unlabelled import LABELS, consistency, soft_labels, without_labels
from cml_dist.types import BODY, COLEARNER, HEAD, Batch, Episode, Learner, Params


@dataclass(frozen=True)
class Point:
    """What a step or a query is a function of; or gradients with respect to it, where None is zero.

    Attributes:
        meta: meta-parameters.
        fast: fast parameters, of one step.
        const: constants of the episode.
    """

    meta: Mapping[str, Tensor]
    fast: Mapping[str, Tensor]
    const: Mapping[str, Tensor]

    def leaves(self) -> Point:
        """New leaves with the same values, that require grad."""
        return Point(*(detached(dict(part), requires_grad=True) for part in self.parts))

    @property
    def parts(self) -> tuple[Mapping[str, Tensor], ...]:
        return self.meta, self.fast, self.const

    def tensors(self) -> list[Tensor]:
        return [value for part in self.parts for value in part.values()]

    def named(self, tensors: Iterable[Tensor | None]) -> Point:
        """``tensors``, which come in the order of :meth:`tensors`, under the names here."""
        left = iter(tensors)
        return Point(*({n: next(left) for n in part} for part in self.parts))


@dataclass
class Cotangent:
    """The gradient of the outer loss at a point of the loop; its tensors are its own, and added to in place."""

    meta: Params = field(default_factory=dict)
    fast: Params = field(default_factory=dict)
    const: Params = field(default_factory=dict)

    def add(self, grads: Point) -> None:
        for mine, theirs in zip((self.meta, self.fast, self.const), grads.parts, strict=True):
            accumulate(mine, theirs)


class InnerLoop:
    """The inner loop on one episode.

    Args:
        meta: meta-parameters by canonical name.
        episode: prepared, on the device of ``meta``.
        problem: the network's losses; its ``micro_batch`` bounds what passes through the network at once.
        method: the rule, the number of steps, the order.
        weights: of each learner's loss on the support set; None: what the method trains with.
        masks: what tensors of the network are multiplied by wherever it is seen, by name: those of a sub-network.

    Attributes:
        fast, const: fast_0 and the constants of the episode, as values.
        steps: inner steps; 0 where nothing adapts.
        labelled_steps: those on the support set alone; the others are on the unlabelled examples as well.
    """

    def __init__(
        self,
        meta: Params,
        episode: Episode,
        problem: Problem,
        method: Method,
        weights: Mapping[Learner, float] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.meta, self.episode, self.problem, self.masks = detached(meta), episode, problem, masks or {}
        self.rule, self.order = method.rule, method.order
        if weights is None:
            weights = {"meta": 1.0, "co": method.gamma} if method.both_adapt else {"meta": 1.0}
        self.weights = weights
        self.starts_head = problem.starts_head and "meta" in weights
        self._features = self._support_features()
        fast, const = self._start(self.meta, self._features)
        self.fast, self.const = detached(fast), detached(const)
        self.unlabelled = method.unlabelled if episode.unlabelled is not None and self.fast else None
        self.labelled_steps = method.inner_steps if self.fast else 0
        self.steps = self.labelled_steps + (self.unlabelled.steps if self.unlabelled else 0)

    # ------------------------------------------------------------------ the start

    def _start(self, meta: Params, features: Tensor | None) -> tuple[Params, Params]:
        """fast_0 and constants, as functions of meta-parameters and of the support set's features."""
        head: Params = {}
        if self.starts_head:
            own = {n: p for n, p in meta.items() if part_of(n) == HEAD}
            head = self.problem.head_from(own, features, self.episode)
            meta = {n: p for n, p in meta.items() if n not in own}
        fast, const = self.rule.start({**meta, **head}, self.episode)
        return fast, {**{n: value for n, value in head.items() if n not in fast}, **const}

    def _support_features(self) -> Tensor | None:
        """What the head is started from: ``[N, D]`` of the support set at the meta-parameters, as values."""
        if not (self.starts_head and self.problem.head_reads_support):
            return None
        net = self._before(Point(self.meta, {}, {}))
        return self.problem.values(net, self.episode.support, ("pooled",))[0]

    def pull_back_start(self, back: Cotangent) -> None:
        """Turn a gradient at the start into one with respect to the meta-parameters alone, in ``back.meta``."""
        leaves = detached(self.meta, requires_grad=True)
        made = [] if self._features is None else [self._features.detach().requires_grad_()]
        fast, const = self._start(leaves, *(made or [None]))
        values, vectors = [], []
        for started, grads in ((fast, back.fast), (const, back.const)):
            for name in list(grads):
                if started[name] is leaves.get(name):  # it starts as itself: no copy
                    accumulate(back.meta, {name: grads.pop(name)}, owned=True)
                elif started[name].requires_grad:
                    values.append(started[name])
                    vectors.append(grads.pop(name))
        if not values:
            return
        grads = torch.autograd.grad(values, [*leaves.values(), *made], vectors, allow_unused=True)
        accumulate(back.meta, dict(zip(leaves, grads, strict=False)))
        if made and grads[-1] is not None:
            here = Point(self.meta, {}, {})
            self._pull_back_pass(here, self._before, "pooled", grads[-1], back)

    # ------------------------------------------------------------------ a step

    def step(self, fast: Params, k: int) -> Params:
        """fast_{k+1} as values, without a graph. Cost: memory of one micro-batch."""
        return detached(self.move(Point(self.meta, fast, self.const), k, differentiable=False))

    def move(self, at: Point, k: int, *, differentiable: bool) -> Params:
        """fast_{k+1}, from the first step that reads unlabelled examples on with their labels.

        Args:
            differentiable: the inner gradient has a graph, as in :meth:`gradient`, and so have the labels.
        """
        labels: Params = {}
        if k >= self.labelled_steps:
            labels = {LABELS: at.fast[LABELS] if LABELS in at.fast else self._labels(at, differentiable)}
        at = Point(at.meta, without_labels(at.fast), {**at.const, **labels})
        grad = self.gradient(at, k, differentiable=differentiable)
        return {**self.rule.update(dict(at.meta), dict(at.fast), dict(at.const), grad, k), **labels}

    def _labels(self, at: Point, differentiable: bool) -> Tensor:
        """Soft labels of the unlabelled examples, by the learner whose loss is descended, after the labelled steps."""
        here, k = at if differentiable else at.leaves(), max(self.labelled_steps - 1, 0)
        names, rates = [*at.meta, *at.fast], self.rule.rates(at.fast)

        def outputs(inputs: Sequence[Tensor]) -> Tensor:
            view, learner = self._view(here.named(inputs), k), next(iter(self.weights))
            parts = self.problem.micro_batches(self.episode.unlabelled)
            return torch.cat([self.problem.outputs(view, part, [learner])[0] for part, _ in parts])

        places = [len(at.meta) + names[len(at.meta) :].index(n) for n in rates]
        gradient = self.gradient(here, k, differentiable=differentiable)
        labels = soft_labels(self.unlabelled, outputs, here.tensors(), rates, places, gradient)
        return labels if differentiable else labels.detach()

    def gradient(self, at: Point, k: int, *, differentiable: bool) -> GradFn:
        """The gradient of the support loss in step ``k``, as a function of a point of the fast space.

        Args:
            at: what the step starts from (``meta`` and ``const`` are what counts).
            differentiable: the values have a graph, to ``at`` and to the point.
        """

        def values(point: Params) -> Params:
            total: Params = {}
            losses = list(self._losses(k, at))
            for loss in losses:
                leaves = detached(point, requires_grad=True)
                grads = _gradients(loss(Point(at.meta, leaves, at.const)), leaves)
                accumulate(total, grads, owned=len(losses) == 1)
            return total

        def whole(point: Params) -> Params:
            # Nodes of their own: the gradient is a partial one, also where a rule makes one of the point's tensors from
            # another (SGD never does), or labels from all of them.
            alone = self.rule.is_sgd and LABELS not in at.const
            nodes = point if alone else {n: value.view_as(value) for n, value in point.items()}
            first, *others = (loss(Point(at.meta, nodes, at.const)) for loss in self._losses(k, at))
            return _gradients(sum(others, first), nodes, create_graph=True)

        def streamed(point: Params) -> Params:
            here = Point(at.meta, point, at.const)
            return dict(zip(point, _Streamed.apply(self, here, k, values, *here.tensors()), strict=True))

        if not differentiable:
            return values
        sets = [self.episode.support, *[self.episode.unlabelled] * (LABELS in at.const)]
        return whole if all(len(self.problem.micro_batches(part)) == 1 for part in sets) else streamed

    def pull_back_step(self, fast: Params, k: int, back: Cotangent) -> None:
        """Turn a gradient at fast_{k+1} into the gradient at fast_k, in ``back.fast``; what shapes the step collects.

        Cost: one Hessian-vector product (reverse over reverse), memory of one micro-batch's graph.
        """
        here = Point(self.meta, fast, self.const)
        if self.rule.is_sgd and k < self.labelled_steps:
            if self.order == 2:  # lambda - H alpha lambda; of first order the step is the identity
                vector = {n: -rate * back.fast[n] for n, rate in self.rule.rates(fast).items()}
                self.add_products(here, k, vector, back)
            return
        leaves = here.leaves()
        after = self.move(leaves, k, differentiable=self.order == 2)
        moved = [n for n in after if after[n].requires_grad and n in back.fast]  # no query sees labels
        values, vectors = [after[n] for n in moved], [back.fast[n] for n in moved]
        back.fast = {}
        back.add(here.named(torch.autograd.grad(values, leaves.tensors(), vectors, allow_unused=True)))
        back.fast = {n: back.fast[n] if n in back.fast else torch.zeros_like(fast[n]) for n in fast}

    def add_products(self, at: Point, k: int, vector: Params, into: Cotangent) -> None:
        """Add (d gradient / d ``at``)^T ``vector``, one micro-batch at a time; the gradient is that by ``at.fast``."""
        for loss in self._losses(k, at):
            leaves = at.leaves()
            grads = _gradients(loss(leaves), {n: leaves.fast[n] for n in vector}, create_graph=True)
            curved = [n for n, grad in grads.items() if grad.requires_grad]  # the others are constants
            if not curved:
                continue
            through = torch.autograd.grad(
                [grads[n] for n in curved], leaves.tensors(), [vector[n] for n in curved], allow_unused=True
            )
            del grads, leaves
            into.add(at.named(through))

    def _losses(self, k: int, at: Point) -> Iterator[Callable[[Point], Tensor]]:
        """The loss of step ``k`` as terms, one a micro-batch, each a scalar function of a point.

        Args:
            at: where its constants have labels of the unlabelled examples, their terms follow the support set's.
        """
        for part, share in self.problem.micro_batches(self.episode.support):

            def loss(at: Point, part: Batch = part, share: float = share) -> Tensor:
                params = self._view(at, k)
                outputs = list(self.problem.outputs(params, part.in_step(k), list(self.weights)))
                for number, learner in enumerate(self.weights):
                    if learner in self.problem.compared:  # in one piece: the means are of the whole set
                        means = class_means(outputs[number], part.targets, self.episode.ways)
                        outputs[number] = self.problem.against_prototypes(outputs[number], means)
                return _weighted(self.weights, [share * self.problem.loss(out, part.targets) for out in outputs])

            yield loss
        if LABELS not in at.const:
            return
        begin = 0
        for part, share in self.problem.micro_batches(self.episode.unlabelled):
            rows = slice(begin, begin := begin + len(part.targets))
            factor = self.unlabelled.weight * share

            def loss(at: Point, part: Batch = part, rows: slice = rows, factor: float = factor) -> Tensor:
                outputs = self.problem.outputs(self._view(at, k), part, list(self.weights))
                labels = at.const[LABELS][rows]
                return _weighted(self.weights, [factor * consistency(out, labels) for out in outputs])

            yield loss

    def _view(self, at: Point, k: int) -> Params:
        # A rule may show the network a frozen weight changed: constants come with the meta-parameters.
        meta, fast = {**self.problem.buffers, **at.meta}, without_labels(at.fast)
        return self._masked(self.rule.view(meta, fast, dict(at.const), k))

    def _before(self, at: Point) -> Params:
        """The network before anything adapts."""
        return self._masked(self.rule.network({**self.problem.buffers, **at.meta}, 0))

    def _masked(self, network: Params) -> Params:
        return {n: p * self.masks[n] if n in self.masks else p for n, p in network.items()}

    def seen(self) -> Params:
        """What the network sees in the first step, as values."""
        return self._view(Point(self.meta, self.fast, self.const), 0)

    def slopes(self) -> Params:
        """The gradient of the support loss at the start, by meta-parameter; of what adapts, by its first value."""
        here, total = Point(self.meta, self.fast, self.const), Cotangent()
        for loss in self._losses(0, here):
            leaves = here.leaves()
            total.add(here.named(torch.autograd.grad(loss(leaves), leaves.tensors(), allow_unused=True)))
        return {**total.meta, **total.fast}

    # ------------------------------------------------------------------ the query

    def query(self, fast: Params, k: int, weights: Mapping[Learner, float], into: Cotangent) -> dict[str, Tensor]:
        """Add the gradient of the weighted query losses after step ``k`` (eq. 6); return the terms of the episode.

        Args:
            fast: fast_{k+1} (fast_0 where there is no step), as values.
            weights: of each learner's loss; a learner of weight 0 is only scored.

        Returns:
            ``loss`` (weighted), ``outer_loss`` and ``score`` of the learner, and of a co-learner ``colearner_loss`` and
            ``colearner_score``; scalars.
        """
        problem, query = self.problem, self.episode.query
        here, learners = Point(self.meta, fast, self.const), list(problem.learners)
        prototypes = {learner: self._prototypes(here, k, learner) for learner in problem.compared}
        by_prototypes = {learner: torch.zeros_like(means) for learner, means in prototypes.items()}
        parts, values = [], []
        for part, share in problem.micro_batches(query):
            leaves = here.leaves()
            outputs = list(problem.outputs(self._view(leaves, k), part, learners))
            inputs = [*leaves.tensors(), *prototypes.values()]
            for learner, means in prototypes.items():
                number = learners.index(learner)
                outputs[number] = problem.against_prototypes(outputs[number], means)
            losses = [share * problem.loss(out, part.targets) for out in outputs]
            total = _weighted({learner: weights.get(learner, 0.0) for learner in learners}, losses)
            grads = torch.autograd.grad(total, inputs, allow_unused=True)
            into.add(here.named(grads))
            for total_of, grad in zip(by_prototypes.values(), grads[len(grads) - len(prototypes) :], strict=True):
                if grad is not None:
                    total_of += grad
            parts.append([out.detach() for out in outputs])
            values.append([total.detach(), *(loss.detach() for loss in losses)])
            del leaves, inputs, outputs, losses, total, grads
        for learner, gradient in by_prototypes.items():
            if weights.get(learner):
                support = self.episode.support
                members = class_means(torch.eye(len(support.targets)).to(gradient), support.targets, self.episode.ways)
                self._pull_back_pass(here, lambda at: self._view(at, k), learner, members.T @ gradient, into)
        outputs = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        loss, *losses = [torch.stack(pieces).sum() for pieces in zip(*values, strict=True)]
        terms = {"loss": loss, "outer_loss": losses[0], "score": problem.score(outputs[0], query.targets)}
        if len(losses) == 2:
            terms["colearner_loss"] = losses[1]
            terms["colearner_score"] = problem.score(outputs[1], query.targets)
        return terms

    def add_penalty(self, fast: Params, into: Cotangent) -> Tensor | None:
        """Add the gradient of the rule's own outer term at the end of the loop; return its value."""
        leaves = Point(self.meta, fast, self.const).leaves()
        value = self.rule.penalty(dict(leaves.meta), without_labels(leaves.fast), dict(leaves.const), self.episode)
        if value is None:
            return None
        into.add(leaves.named(torch.autograd.grad(value, leaves.tensors(), allow_unused=True)))
        return value.detach()

    def _prototypes(self, at: Point, k: int, learner: Learner) -> Tensor:
        """The classes' mean embeddings ``[ways, E]``, a leaf."""
        support = self.episode.support
        (embedded,) = self.problem.values(self._view(at, k), support, (learner,))
        return class_means(embedded, support.targets, self.episode.ways).requires_grad_()

    def _pull_back_pass(
        self, at: Point, view: Callable[[Point], Params], one: Pass, gradient: Tensor, into: Cotangent
    ) -> None:
        """Add the gradient at ``at`` from one ``[N, ...]`` of the support set's outputs, one micro-batch at a time."""
        begin = 0
        for part, _ in self.problem.micro_batches(self.episode.support):
            leaves = at.leaves()
            (outputs,) = self.problem.outputs(view(leaves), part, (one,))
            if not outputs.requires_grad:  # features of a frozen body
                return
            vector = gradient[begin : begin + len(outputs)]
            begin += len(outputs)
            into.add(at.named(torch.autograd.grad(outputs, leaves.tensors(), vector, allow_unused=True)))


class _Streamed(torch.autograd.Function):
    """The gradient of a support set that passes in micro-batches: no graph is kept, the backward makes each anew."""

    @staticmethod
    def forward(ctx, loop: InnerLoop, at: Point, k: int, values: GradFn, *tensors: Tensor):
        ctx.loop, ctx.at, ctx.k = loop, at, k
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():  # of the support loss, inside; the values have no graph
            return tuple(values(dict(at.fast)).values())

    @staticmethod
    @once_differentiable
    def backward(ctx, *vectors: Tensor):
        at = ctx.at.named(ctx.saved_tensors)
        into = Cotangent()
        with torch.enable_grad():
            ctx.loop.add_products(at, ctx.k, dict(zip(at.fast, vectors, strict=True)), into)
        pairs = zip((into.meta, into.fast, into.const), at.parts, strict=True)
        return (None, None, None, None, *(found.get(n) for found, part in pairs for n in part))


# --------------------------------------------------------------------------- adapting, for a test


def adapt(meta: Params, episode: Episode, problem: Problem, method: Method, learner: Learner = "meta") -> Params:
    """What the network is after the whole inner loop on an episode's support set, as values by canonical name.

    Args:
        learner: whose support loss is descended: ``meta`` adapts psi and theta (eq. 8), ``co`` psi alone with phi
            frozen (eq. 9), or with phi where both heads adapt.
    """
    loop = _adapting_loop(meta, episode, problem, method, learner)
    fast = loop.fast
    for k in range(loop.steps):
        fast = loop.step(fast, k)
    return loop._view(Point(loop.meta, fast, loop.const), max(loop.steps - 1, 0))


def adapting(
    meta: Params, episode: Episode, problem: Problem, method: Method, learner: Learner = "meta"
) -> Iterator[Params]:
    """What :func:`adapt` gives after no step, one, two, ... and all: one alone where nothing adapts.

    Each is made when it is asked for.
    """
    loop = _adapting_loop(meta, episode, problem, method, learner)
    fast = loop.fast
    yield loop._view(Point(loop.meta, fast, loop.const), 0)
    for k in range(loop.steps):
        fast = loop.step(fast, k)
        yield loop._view(Point(loop.meta, fast, loop.const), k)


def _adapting_loop(meta: Params, episode: Episode, problem: Problem, method: Method, learner: Learner) -> InnerLoop:
    """The loop of a learner that is used: on its own support loss, without what is drawn for training."""
    if learner == "co":
        parts = (BODY, COLEARNER) if method.both_adapt else (BODY,)
    else:
        parts = (BODY, HEAD)
    rule = replace(method.rule, parts=parts)
    episode = replace(episode, support=replace(episode.support, by_step={}))  # what is drawn a step is of training
    return InnerLoop(meta, episode, problem, replace(method, rule=rule), {learner: 1.0})


# --------------------------------------------------------------------------- small things


def accumulate(total: Params, grads: Mapping[str, Tensor | None], *, owned: bool = False) -> None:
    """Add ``grads`` to ``total``, in place. Never the other way round: what autograd returns may share storage.

    Args:
        owned: the gradients are the caller's own, so that ``total`` may keep them.
    """
    for name, grad in grads.items():
        if grad is None:
            continue
        if name in total:
            total[name].add_(grad)
        else:
            total[name] = grad if owned else grad.clone()


def _gradients(loss: Tensor, inputs: Params, *, create_graph: bool = False) -> Params:
    """d loss / d inputs by name; zeros where the loss does not depend on one (e.g. an unused class token)."""
    grads = torch.autograd.grad(loss, list(inputs.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(inputs, grads, strict=True))


def _weighted(weights: Mapping[Learner, float], losses: Iterable[Tensor]) -> Tensor:
    """The weighted sum; a loss of weight 0 is left out, since 0 times an overflowing one would be NaN."""
    pairs = [(w, loss) for w, loss in zip(weights.values(), losses, strict=True) if w]
    total = pairs[0][1] if pairs[0][0] == 1.0 else pairs[0][0] * pairs[0][1]
    for w, loss in pairs[1:]:
        total = total + w * loss
    return total
