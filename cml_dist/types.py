"""The objects that flow between the rooms. Plain data; torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Learner = Literal["meta", "co"]
"""Who gives the outputs: the meta-learner f_m = (psi, theta) or the co-learner f_c = (psi, phi)."""

BODY, HEAD, COLEARNER, RULE = "body", "head", "colearner", "rule"
"""The parts, and the first component of every canonical parameter name: psi, theta, phi, and what a method learns."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
"""Ways to bring an image to another size, by Pillow's names in lower case."""

Params = dict[str, Tensor]
"""Parameters by canonical name, e.g. ``body.block1.conv.weight``; the order is the network's own."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of tensors that may not exist yet, by name. A checkpoint's names are ``param/<canonical name>`` and
``moment/<key>/<canonical name>``, with torch's own key of the optimizer's state (``exp_avg``, ``step``, ...)."""


@dataclass(frozen=True)
class Batch:
    """Inputs with their targets.

    Attributes:
        inputs: ``[N, ...]``; uint8 images before ``Domain.prepare``, floating point after it.
        targets: ``[N]`` int64 class numbers, or ``[N, D]`` floating point values for regression.
        context: tensors that its examples share, keyword arguments of the body (e.g. of a graph); empty for images.
        by_step: the same with a leading axis, of a support set in training: inner step k has row k, and from the last
            row on it begins again.
    """

    inputs: Tensor
    targets: Tensor
    context: Mapping[str, Tensor] = field(default_factory=dict)
    by_step: Mapping[str, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        shared = ({n: change(value) for n, value in part.items()} for part in (self.context, self.by_step))
        return Batch(change(self.inputs), change(self.targets), *shared)

    def in_step(self, k: int) -> Batch:
        """What the network sees of it in inner step ``k``."""
        rows = {n: value[k % len(value)] for n, value in self.by_step.items()}
        return replace(self, context={**self.context, **rows}, by_step={}) if rows else self

    def tensors(self) -> list[Tensor]:
        return [self.inputs, self.targets, *self.context.values(), *self.by_step.values()]


@dataclass(frozen=True)
class Episode:
    """One few-shot task: a pure function of (seed, split, index).

    Attributes:
        support: what the inner loop adapts on (S_i in the paper).
        query: what the adapted learner is judged on (Q_i).
        split: ``"train"``, ``"val"`` or ``"test"``.
        index: the global number of the episode within its split.
        ways: classes of the episode (labels are 0 .. ways - 1); 0 for regression.
        unlabelled: further examples of its classes and of others, whose targets say nothing (-1); None: there are none.
    """

    support: Batch
    query: Batch
    split: str
    index: int
    ways: int = 0
    unlabelled: Batch | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Episode:
        """The episode with each of its tensors changed."""
        return self.each(lambda batch: batch.map(change))

    def each(self, change: Callable[[Batch], Batch]) -> Episode:
        """The episode with each of its sets changed, in the order of :attr:`batches`."""
        return replace(self, **dict(zip(("support", "query", "unlabelled"), map(change, self.batches), strict=False)))

    @property
    def batches(self) -> tuple[Batch, ...]:
        """Support set, query set, and the unlabelled examples where there are any."""
        return (self.support, self.query) if self.unlabelled is None else (self.support, self.query, self.unlabelled)

    def to(self, device: torch.device) -> Episode:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class EachTime:
    """Episodes that are made anew each time one goes through them, so that no pass has to keep them for the next."""

    make: Callable[[], Iterator[Episode]]

    def __iter__(self) -> Iterator[Episode]:
        return self.make()


@dataclass(frozen=True)
class Features:
    """What a backbone gives to the heads.

    Attributes:
        tap: what the co-learner reads, before pooling: map ``[N, C, H, W]``, tokens ``[N, T, C]`` or vector ``[N, D]``.
        pooled: what the head (meta-learner) reads: ``[N, D]``.
    """

    tap: Tensor
    pooled: Tensor
