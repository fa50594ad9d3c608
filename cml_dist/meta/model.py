"""The one module that is ever wrapped: its forward is a whole meta-step, its backward hands over finished values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from cml_dist.meta.gradient import Engine, MetaGradient, meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.types import Episode, Params

Average = Callable[[list[Tensor]], None]
"""Puts the mean over all ranks in the place of each tensor."""


class MetaModel(nn.Module):
    """Owns all meta-parameters (psi, theta, phi, and what a rule learns), and streams a rank's episodes through
    :func:`meta_gradient`.

    DDP and DeepSpeed see an ordinary module: one forward, one backward, one reduction a meta-step. They need to know
    nothing of the inner loop, and no autograd graph outlives an episode.

    Args:
        net: a :class:`cml_dist.nets.network.CmlNet` with its initial values.
        loss, score: the domain's, see :class:`Problem`.
        method: what the meta-gradient is.
        engine: how it is computed.
        micro_batch, autocast: see :class:`Problem`.
        clip_value: the largest element of the meta-gradient over all ranks; None: it is not clamped.

    Attributes:
        compute: :func:`meta_gradient`, or what gives the same.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        score: Callable[[Tensor, Tensor], Tensor],
        method: Method,
        engine: Engine | str,
        *,
        micro_batch: int | None = None,
        autocast: torch.dtype | None = None,
        clip_value: float | None = None,
    ) -> None:
        super().__init__()
        named = dict(net.named_parameters())
        self.names: tuple[str, ...] = tuple(named)
        # A flat list, and the network outside the module tree: no hook of a wrapper ever meets the inner loop.
        self.values = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in named.values())
        self.constant_names: tuple[str, ...] = tuple(n for n, _ in net.named_buffers())
        for number, (_, buffer) in enumerate(net.named_buffers()):
            self.register_buffer(f"constant_{number}", buffer.detach().clone())
        self._problem = (Problem(net, loss, score, {}, micro_batch, autocast),)
        self.method, self.clip_value = method, clip_value
        self.engine = Engine(engine) if isinstance(engine, str) else engine
        self.compute: Callable[..., MetaGradient] = meta_gradient

    @property
    def problem(self) -> Problem:
        """The network's loss as a function of parameters, with the constants on this module's device."""
        (problem,) = self._problem
        problem.buffers = {n: getattr(self, f"constant_{i}") for i, n in enumerate(self.constant_names)}
        return problem

    def params(self) -> Params:
        """All meta-parameters by canonical name, as values that share storage with this module's parameters."""
        return {n: p.detach() for n, p in zip(self.names, self.values, strict=True)}

    def forward(
        self,
        episodes: Iterable[Episode],
        weight: float,
        diagnose: frozenset[int] = frozenset(),
        meta_step: int = 0,
        average: Average = lambda values: None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the episodes' outer losses, whose backward delivers the weighted sum of meta-gradients.

        Args:
            episodes: this rank's, prepared, on this module's device; may be empty. Asked for ``method.passes`` times.
            weight: of each episode (for a mean over B episodes reduced by averaging over N ranks: N / B).
            diagnose: indices of the episodes of which the cosine of the learners' meta-gradients is wanted.
            meta_step: the number of the meta-step, for methods with a schedule.
            average: the mean over the ranks, in place.

        Returns:
            (loss, sums): a scalar; and by term the ``[2]`` float64 tensor of its sum over the episodes and its count.
            Both at the parameters themselves, also where the meta-gradient is taken above them (``method.ascent``).

        Raises:
            TypeError: several passes over an iterator: give a list, or :class:`cml_dist.types.EachTime`.

        Cost: memory of one episode, whatever their number; with ``method.ascent`` all passes twice, and a copy of the
        parameters. Collective: none (the wrapper's backward reduces), save ``average``, once for ``method.ascent`` and
        once for ``clip_value``: ranks without episodes join.
        """
        if self.method.passes > 1 and isinstance(episodes, Iterator):
            raise TypeError("an iterator gives its episodes once, and they are needed twice: give a list or EachTime")
        params = self.params()
        totals, sums = self._stream(params, episodes, weight, diagnose, meta_step)
        if self.method.ascent:
            average(totals)
            above = _ascended(params, totals, self.method.ascent)
            totals, _ = self._stream(above, episodes, weight, frozenset(), meta_step)
            del above
        if self.clip_value is not None:
            average(totals)
            _clamp(totals, self.clip_value)
        loss = torch.zeros((), dtype=torch.float64, device=totals[0].device)
        if "loss" in sums:
            loss = loss + weight * sums["loss"][0]
        return _Deliver.apply(loss.to(totals[0]), totals, *self.values), sums

    def _stream(
        self, params: Params, episodes: Iterable[Episode], weight: float, diagnose: frozenset[int], meta_step: int
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The weighted sum of the episodes' meta-gradients at ``params``, and the sums of their terms."""
        problem, sums, counts = self.problem, {}, Counter()
        totals = [torch.zeros_like(p) for p in self.values]
        for episode in episodes:
            one = self.compute(
                params,
                episode,
                problem,
                self.method,
                self.engine,
                diagnose=episode.index in diagnose,
                meta_step=meta_step,
            )
            for total, name in zip(totals, self.names, strict=True):
                total.add_(one.grads[name], alpha=weight)
            for term, value in one.terms.items():
                sums[term] = sums[term] + value.double() if term in sums else value.to(torch.float64, copy=True)
            counts.update(one.terms.keys())
            del one  # or its gradients would stay while the next episode is at its peak
        return totals, {t: torch.stack([total, torch.full_like(total, counts[t])]) for t, total in sums.items()}


def _ascended(params: Params, gradient: list[Tensor], radius: float) -> Params:
    """params + radius gradient / |gradient|, one norm over all; in the memory of ``gradient``."""
    norm = torch.stack([torch.linalg.vector_norm(g) for g in gradient]).norm().clamp_min(1e-12)
    pairs = zip(params.items(), gradient, strict=True)
    return {name: g.mul_(radius / norm).add_(value) for (name, value), g in pairs}


def _clamp(values: list[Tensor], most: float) -> None:
    """Each element to -most .. most, in place, but for inf and NaN: they say that the step is to be left out."""
    for value in values:
        value.copy_(torch.where(value.isfinite(), value.clamp(-most, most), value))


class _Deliver(torch.autograd.Function):
    """A loss whose gradient is already known: backward gives each parameter its finished value."""

    @staticmethod
    def forward(ctx, loss: Tensor, grads: list[Tensor], *values: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx, scale: Tensor):
        grads, ctx.grads = ctx.grads, None
        # In place: the totals are nobody else's, and a second copy of them would be the largest thing in memory here.
        return None, None, *(g.mul_(scale.to(g)) for g in grads)
