"""The memory of a meta-step: the real :class:`MetaModel` runs on tensors without storage. No weights, no arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cml_dist.memory.live_bytes import ELSEWHERE, LiveBytes, bytes_of
from cml_dist.meta.gradient import Engine, points_held
from cml_dist.meta.inner import InnerLoop
from cml_dist.meta.model import MetaModel
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.types import Batch, EachTime, Episode

STEPS = 2
"""Inner steps that are simulated; from there the peak is a straight line (see `meta_step_footprint`)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a meta-step holds at its peak on one rank, above parameters and buffers.

    Attributes:
        episode: inputs and targets of one episode.
        gradients: the accumulated meta-gradient (it becomes ``.grad``), and the point of an upper ascent.
        adapted: adapted parameters along the inner loop, as far as they are kept on the computing device.
        activations: all the rest: saved tensors of first and second order, temporaries, kernels' scratch.
    """

    episode: int
    gradients: int
    adapted: int
    activations: int

    @property
    def peak(self) -> int:
        return self.episode + self.gradients + self.adapted + self.activations


def meta_step_footprint(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    method: Method,
    engine: Engine | str,
    episode: Episode,
    *,
    episodes: int = 1,
    micro_batch: int | None = None,
    autocast: torch.dtype | None = None,
    scratch: bool = True,
) -> Footprint:
    """Peak memory of forward and backward of :class:`MetaModel`, without running it.

    Of network and episode only structure, shapes and types count; they may lie on any device, ``meta`` too.

    Args:
        loss, score: the domain's.
        engine: with a device of its own, the adapted copies do not count.
        episode: as the domain prepares it.
        episodes: of a meta-step on this rank.
        micro_batch, autocast: see :class:`cml_dist.meta.problem.Problem`.
        scratch: count what convolutions of the CPU take besides (a GPU's own workspaces are not counted).

    Cost: seconds, whatever the number of inner steps, episodes and micro-batches, because the loops repeat themselves:

    - inner steps: save the first, which starts from the parameters themselves, every step needs the same; likewise
      those on unlabelled examples, save the first of them, which makes their labels. So it is a straight line from 2
      steps on: a point that is kept adds its copy of what adapts, with its moments, in ``adjoint`` (SGD at first order
      keeps none), and a step in ``graph`` what a third one shows.
    - episodes: the second meets what the first left behind, the third the same again. So two stand for more.
    - micro-batches of ``adjoint``: likewise the second and a smaller last one stand for more; only their outputs (a few
      bytes an example) add up.
    """
    engine = Engine(engine) if isinstance(engine, str) else engine
    # An unrolled graph keeps every micro-batch, so there none may be left out.
    phases = method.inner_steps, method.steps - method.inner_steps if episode.unlabelled is not None else 0
    unrolled = engine.name == "graph" and method.order == 2
    seen = episode if unrolled else _shortened(episode, micro_batch)
    bare = copy.deepcopy(net).to("meta")
    away = engine.device is not None
    way = Engine(engine.name, device=ELSEWHERE if away else None)

    def peak(*steps: int) -> int:
        unlabelled = replace(method.unlabelled, steps=steps[1]) if phases[1] else None
        # The meta-steps that need most.
        method_then = replace(method, inner_steps=steps[0], first_order_steps=0, unlabelled=unlabelled)
        model = MetaModel(bare, loss, score, method_then, way, micro_batch=micro_batch, autocast=autocast)
        return _peak(model, seen, min(episodes, 2), scratch, fake=autocast is not None or away)

    # What the inner loop moves, with its moments, and a head that the episode starts.
    problem = Problem(bare, loss, score, dict(bare.named_buffers()))
    here = episode.map(lambda tensor: torch.empty_like(tensor, device="meta"))
    adapts = sum(map(bytes_of, InnerLoop(dict(bare.named_parameters()), here, problem, method).fast.values()))
    steps, few = sum(phases), [min(count, STEPS) for count in phases]
    if not unrolled and (away or (method.order == 1 and method.rule.is_sgd)):
        held = min(steps, 1)
    else:
        held = points_held(steps, engine.trajectory)
    gradients, whole = method.passes * sum(map(bytes_of, bare.parameters())), peak(*few)
    activations = whole - _size(seen) - gradients - adapts * min(held, sum(few))
    for phase, count in enumerate(phases):
        if unrolled and count > STEPS:
            one_more = [each + (number == phase) for number, each in enumerate(few)]
            activations += (count - STEPS) * (peak(*one_more) - whole - adapts)
    return Footprint(_size(episode), gradients, adapts * held, activations)


def _peak(model: MetaModel, episode: Episode, episodes: int, scratch: bool, fake: bool) -> int:
    """Peak of a forward and backward of ``model`` above its parameters and buffers, with one new episode at a time.

    On the meta device all tensors are alike, which is fastest. A ``fake`` CPU is for what asks where a tensor is:
    autocast, and copies elsewhere. Either stands for the computing device: outputs have the same sizes on all.
    """
    device = torch.device("cpu" if fake else "meta")

    def storageless(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    with FakeTensorMode() if fake else nullcontext():
        model.values = nn.ParameterList(nn.Parameter(storageless(p)) for p in model.values)
        for name, buffer in list(model.named_buffers()):
            setattr(model, name, storageless(buffer))
        with LiveBytes(scratch, elsewhere=ELSEWHERE if fake else None) as live:
            live.standing([*model.parameters(), *model.buffers()])
            made = EachTime(lambda: (replace(episode.map(storageless), index=n) for n in range(episodes)))
            # The trainer measures the cosine in all episodes of some steps; the last one shows what it takes.
            loss, _ = model(made, 1.0, frozenset({episodes - 1}))
            loss.backward()
    return live.peak


def _shortened(episode: Episode, micro_batch: int | None) -> Episode:
    """The episode with at most two whole micro-batches and the smaller last one in each set."""

    def shorter(batch: Batch) -> Batch:
        count = len(batch.targets)
        if micro_batch is None or count <= 3 * micro_batch:
            return batch
        kept = 2 * micro_batch + count % micro_batch
        inputs, targets = (values[:1].expand(kept, *values.shape[1:]) for values in (batch.inputs, batch.targets))
        return replace(batch, inputs=inputs, targets=targets)

    return replace(episode, support=shorter(episode.support), query=shorter(episode.query))


def _size(episode: Episode) -> int:
    return sum(bytes_of(tensor) for batch in episode.batches for tensor in batch.tensors())
