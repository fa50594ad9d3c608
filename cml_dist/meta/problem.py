"""What is differentiated: a stateless network with the domain's loss and score, at *given* parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from cml_dist.types import HEAD, Batch, Episode, Learner, Params

Pass = Literal["meta", "co", "pooled"]
"""What a pass through the network gives: outputs of a learner, or the features that the head reads."""


@dataclass(frozen=True)
class Seen:
    """What an adapted network answers by, beside its parameters.

    Attributes:
        means: the classes' mean embeddings ``[ways, E]`` of each learner that compares with them.
        norms: statistics of the support set, as buffers of norms by name; empty: norms take those of the query set.
    """

    means: Mapping[Learner, Tensor]
    norms: Params

    def map(self, change: Callable[[Tensor], Tensor]) -> Seen:
        return Seen(*({n: change(value) for n, value in part.items()} for part in (self.means, self.norms)))


class Problem:
    """Loss and score of a network as pure functions of its parameters.

    Args:
        net: a :class:`cml_dist.nets.network.CmlNet`; only its structure is kept (a copy on the ``meta`` device).
        loss: mean loss of outputs and targets over the examples, a scalar (the domain's).
        score: mean score of outputs and targets over the examples, a scalar (the domain's).
        buffers: constants of the network by name (running statistics, frozen weights: nothing writes them).
        micro_batch: most examples that pass through the network at once; None: all of a set. The sum over
            micro-batches is the same value, as long as no norm of the network couples examples.
        autocast: type of the arithmetic inside the network (``torch.bfloat16``), or None for that of the parameters.
            Parameters, adapted ones too, and losses stay in their own type: a bfloat16 weight has 8 bits, and an inner
            step below 0.4 % of it would vanish.

    Attributes:
        starts_head: whether each episode starts the head's weight and bias.
        head_reads_support: whether it does from features of the support set.
        compared: learners that give embeddings, compared with the classes' means of the support set.
        on_pass: called before each pass through the network, so between inner steps and micro-batches: a long episode
            can show that it gets on.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        score: Callable[[Tensor, Tensor], Tensor],
        buffers: Mapping[str, Tensor],
        micro_batch: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.structure = copy.deepcopy(net).to("meta").eval()
        self.loss, self.score, self.buffers = loss, score, buffers
        self.micro_batch, self.autocast = micro_batch, autocast
        self.on_pass: Callable[[], None] = lambda: None
        self.learners: tuple[Learner, ...] = ("meta",) if net.colearner is None else ("meta", "co")
        self.starts_head: bool = net.starts_head
        self.head_reads_support: bool = net.starts_head and net.head.reads_support
        self.compared: tuple[Learner, ...] = net.compared

    # ------------------------------------------------------------------ passes through the network

    def outputs(self, params: Params, batch: Batch, passes: Sequence[Pass]) -> tuple[Tensor, ...]:
        """What is asked for at ``params``, ``[N, ...]`` each, from one pass through the body.

        A learner that compares with prototypes gives its embedding: see :meth:`against_prototypes`.
        """
        self.on_pass()
        # Parameters that the asked-for heads do not use may be absent, so strict stays off; a missing one that *is*
        # used would be a tensor on the meta device and fail at once.
        state = {**self.buffers, **params}
        arguments = (batch.inputs,), {"learners": passes, **batch.context}
        if self.autocast is None:
            return functional_call(self.structure, state, *arguments)
        # A context a call, left before any gradient is taken: autocast's cache of cast weights dies with it, and cannot
        # hand a weight that was cast without a graph to a pass that needs one.
        with torch.autocast(batch.inputs.device.type, self.autocast):
            outputs = functional_call(self.structure, state, *arguments)
        return tuple(out.to(batch.inputs.dtype) for out in outputs)

    def micro_batches(self, batch: Batch) -> list[tuple[Batch, float]]:
        """The batch in pieces of at most ``micro_batch`` examples, each with its weight in a mean over examples."""
        size = self.micro_batch
        total = len(batch.targets)
        if size is None or size >= total:
            return [(batch, 1.0)]
        inputs, targets = batch.inputs.split(size), batch.targets.split(size)
        return [(replace(batch, inputs=x, targets=t), len(t) / total) for x, t in zip(inputs, targets, strict=True)]

    def values(self, params: Params, batch: Batch, passes: Sequence[Pass]) -> list[Tensor]:
        """:meth:`outputs` of a whole batch, without a graph."""
        with torch.no_grad():
            parts = [self.outputs(params, part, passes) for part, _ in self.micro_batches(batch)]
            return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]

    # ------------------------------------------------------------------ what an episode's support set makes

    def head_from(self, own: Params, features: Tensor | None, episode: Episode) -> Params:
        """The head's values at the start of an episode, where its support set or its number of classes makes them.

        Args:
            own: the head's meta-parameters by canonical name.
            features: ``[N, D]`` of the support set, where the head is started from them.
        """
        short = {n.removeprefix(f"{HEAD}."): p for n, p in {**self.buffers, **own}.items() if n.startswith(f"{HEAD}.")}
        started = self.structure.head.start(short, features, episode.support.targets, episode.ways)
        return {f"{HEAD}.{n}": value for n, value in started.items()}

    def against_prototypes(self, embedded: Tensor, prototypes: Tensor) -> Tensor:
        """Outputs ``[N, ways]`` of a prototypical learner: minus the squared distances to ``[ways, E]``."""
        return -(embedded[:, None, :] - prototypes[None]).square().sum(2)

    # ------------------------------------------------------------------ tests

    def answers(
        self,
        params: Params,
        episode: Episode,
        learners: Sequence[Learner],
        norm: Literal["batch", "support"] = "batch",
    ) -> list[Tensor]:
        """Outputs ``[N, output_dim]`` of each learner on the query set at adapted parameters, without a graph.

        Args:
            learners: one pass through the body serves all.
            norm: norms by batch statistics take those of the query set itself (``batch``, as in the paper), or those of
                the support set (``support``), so that an answer does not depend on its neighbours.
        """
        return self.answers_by(self.seen_of(params, episode, learners, norm), params, episode.query, learners)

    def seen_of(
        self, params: Params, episode: Episode, learners: Sequence[Pass], norm: Literal["batch", "support"]
    ) -> Seen:
        """What :meth:`answers` needs of the support set at adapted parameters; arguments as there."""
        support = episode.support
        compared = [learner for learner in learners if learner in self.compared]
        embedded = self.values(params, support, compared) if compared else []
        means = {one: class_means(e, support.targets, episode.ways) for one, e in zip(compared, embedded, strict=True)}
        return Seen(means, self._statistics(params, support, learners) if norm == "support" else {})

    def answers_by(self, seen: Seen, params: Params, query: Batch, learners: Sequence[Learner]) -> list[Tensor]:
        """:meth:`answers` on a query set, by what was seen of the support set."""
        with self._norms_by(seen.norms):
            outputs = dict(zip(learners, self.values(params, query, learners), strict=True))
        return [
            self.against_prototypes(out, seen.means[one]) if one in seen.means else out for one, out in outputs.items()
        ]

    def _batch_norms(self) -> dict[str, _BatchNorm]:
        """Norms by batch statistics, by name."""
        every = self.structure.named_modules()
        return {n: m for n, m in every if isinstance(m, _BatchNorm) and m.running_mean is None}

    def _statistics(self, params: Params, support: Batch, learners: Sequence[Pass]) -> Params:
        """The statistics of the support set at ``params`` in each norm, as buffers by name."""
        statistics: Params = {}

        def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                maps = inputs[0].float() if inputs[0].dtype == torch.bfloat16 else inputs[0]
                var, mean = torch.var_mean(maps, [d for d in range(maps.ndim) if d != 1], correction=0)
                statistics[f"{name}.running_mean"], statistics[f"{name}.running_var"] = mean, var

            return hook

        hooks = [module.register_forward_pre_hook(record(name)) for name, module in self._batch_norms().items()]
        try:
            if hooks:
                self.values(params, support, learners)
        finally:
            for hook in hooks:
                hook.remove()
        return statistics

    @contextmanager
    def _norms_by(self, statistics: Params) -> Iterator[None]:
        """Inside, norms by batch statistics use these, if there are any."""
        norms = self._batch_norms().values() if statistics else ()
        mine = self.buffers
        try:
            self.buffers = {**mine, **statistics}
            for module in norms:
                module.running_mean, module.running_var = (torch.empty(0, device="meta") for _ in range(2))
            yield
        finally:
            self.buffers = mine
            for module in norms:
                module.running_mean = module.running_var = None


def class_means(embedded: Tensor, targets: Tensor, ways: int) -> Tensor:
    """The mean of each class's examples, ``[ways, E]`` from ``[N, E]``."""
    members = (targets[None] == torch.arange(ways, device=targets.device)[:, None]).to(embedded.dtype)
    return (members / members.sum(1, keepdim=True)) @ embedded


def detached(params: Params, requires_grad: bool = False) -> Params:
    """New leaves that share the values of ``params``."""
    return {n: p.detach().requires_grad_(requires_grad) for n, p in params.items()}
