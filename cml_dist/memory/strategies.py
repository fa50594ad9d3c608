"""Memory and traffic of a rank under each strategy: arithmetic over what DeepSpeed 0.19.8 and DDP allocate. No torch.

A meta-step has three moments, and a rank needs the largest of them:

- *inner loop*: the meta-gradient is computed; the optimizer's state and whatever a strategy keeps for good is there.
- *reduction*: the whole meta-gradient (a value that the inner loop has left, so all at once) meets the buckets.
- *update*: the optimizer's temporaries.

Not counted: the CUDA context and kernels' workspaces (0.5 to 2 GiB), what the caching allocator keeps in pieces that do
not fit, NCCL's own buffers, and what happens once before training (loading, flattening).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from cml_dist.config.deepspeed import BUCKET_ELEMENTS
from cml_dist.memory.footprint import Footprint

BUCKET_BYTES = 4 * BUCKET_ELEMENTS
"""Of a bucket, as the generated DeepSpeed dictionary sets it; DeepSpeed reduces in float32."""

ZERO0_BUCKET_BYTES = 4 * 500_000_000
"""DeepSpeed's fixed bucket where nothing is partitioned (``MEMORY_OPT_ALLREDUCE_SIZE``)."""


@dataclass(frozen=True)
class Strategy:
    """A way to carry the meta-gradient, as ``parallel.strategy`` and ``parallel.offload`` name it."""

    name: str
    offload: str = "none"

    @property
    def stage(self) -> int | None:
        """The ZeRO stage, None without DeepSpeed."""
        return int(self.name[-1]) if self.name.startswith("zero") else None

    def __str__(self) -> str:
        return self.name + {"none": "", "optimizer": " offload", "all": " offload all"}[self.offload]


STRATEGIES = (
    *(Strategy(name) for name in ("single", "ddp", "zero0", "zero1", "zero2", "zero3")),
    Strategy("zero2", "optimizer"),
    Strategy("zero3", "optimizer"),
    Strategy("zero3", "all"),
)
"""From fast to slow: all send the same number of bytes, but in more and more pieces; what leaves the GPU comes last."""


@dataclass(frozen=True)
class ModelSize:
    """Bytes of what a strategy shares out.

    Attributes:
        parameters: all that is meta-trained.
        largest: the largest single one.
        constants: buffers and frozen weights; each rank holds them all.
        moments_per_parameter: copies that the optimizer keeps: 2 for Adam, 1 for SGD with momentum, 0 without.
        reductions: of the whole meta-gradient in a meta-step: the strategy's own, and those inside it.
    """

    parameters: int
    largest: int
    constants: int
    moments_per_parameter: int
    reductions: int = 1


@dataclass(frozen=True)
class RankBudget:
    """Memory of one rank at a moment of a meta-step, and its traffic, in bytes.

    Attributes:
        strategy, offload: as in the configuration.
        moment: ``inner loop``, ``reduction`` or ``update``.
        parameters: whole parameters, and under ZeRO-3 this rank's part of them besides.
        gradients: the accumulated meta-gradient, and what a strategy keeps of the reduced one.
        moments: the optimizer's, and the master copy of this rank's part that ZeRO-1 and 2 update.
        adapted, activations: see :class:`Footprint`; the episode is among the activations.
        buffers: constants of the network, reduction buckets, temporaries.
        host: on the CPU, for a rank, because of offloading.
        sent: bytes that a rank sends in a meta-step (ring collectives).
    """

    strategy: str
    offload: str
    moment: str
    parameters: int
    gradients: int
    moments: int
    adapted: int = 0
    activations: int = 0
    buffers: int = 0
    host: int = 0
    sent: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.moments + self.adapted + self.activations + self.buffers


def rank_budget(strategy: Strategy, model: ModelSize, step: Footprint, world: int) -> RankBudget:
    """What one of ``world`` ranks needs at the moment when it needs most."""
    return max(rank_moments(strategy, model, step, world), key=lambda budget: budget.total)


def rank_moments(strategy: Strategy, model: ModelSize, step: Footprint, world: int) -> Iterator[RankBudget]:
    """What one of ``world`` ranks needs in the inner loop, in the reduction and in the update.

    Sent are two passes of a ring, (N - 1) / N of the parameters' bytes each, under every strategy, and the same again
    for each all-reduce inside the meta-step. An all-reduce is a
    reduce-scatter and an all-gather (DDP, ZeRO-0). ZeRO-1 and 2 reduce each part of the gradient to its owner and
    gather the new parameters; ZeRO-3 scatters the gradient and gathers parameters once, before the forward (counted in
    tests/dist/test_parity.py; it rests on ``use_multi_rank_bucket_allreduce`` and ``stage3_max_live_parameters`` of
    the DeepSpeed configuration).

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/engine.py; torch's DDP.
    """
    whole, stage, offloads = model.parameters, strategy.stage, strategy.offload != "none"
    part = -(-whole // world)
    owned = part if stage in (1, 2, 3) else whole
    parameters, kept_gradients, constants = whole, 0, model.constants
    moments, host = model.moments_per_parameter * owned, 0
    if strategy.name == "ddp":
        kept_gradients = whole  # DDP's buckets, which later are .grad
    elif stage in (1, 2):
        moments += part  # cloned from the flat parameters, also where these are float32 already
    elif stage == 3:
        # The inner loop works on gathered, whole parameters; the part is updated in place (no master copy).
        parameters += 0 if strategy.offload == "all" else part
        kept_gradients = part
        constants += BUCKET_BYTES  # allocated for good
    if offloads:
        # Moments, the copy that is updated, its gradient, the buffer that gradients (3) or new values (2) pass through.
        host = (model.moments_per_parameter + 3) * part
        host += model.largest if stage == 2 else part if strategy.offload == "all" else 0
        moments = kept_gradients = 0
    sent = model.reductions * 2 * whole * (world - 1) // world
    at = partial(
        RankBudget, strategy.name, strategy.offload, parameters=parameters, moments=moments, host=host, sent=sent
    )
    yield at(
        "inner loop",
        gradients=step.gradients + kept_gradients,
        adapted=step.adapted,
        activations=step.activations + step.episode,
        buffers=constants,
    )
    gradients, flattened = whole + kept_gradients, 0
    if stage == 0:
        flattened = min(whole, ZERO0_BUCKET_BYTES)
    elif stage in (1, 2):
        # The bucket has its configured size, whatever the model's; gradients of its own part are copied out of it.
        flattened = BUCKET_BYTES + (model.largest if offloads else 0)
        gradients += 0 if offloads else part
    elif stage == 3:
        flattened = min(whole, BUCKET_BYTES)  # for the reduce-scatter
    yield at("reduction", gradients=gradients, buffers=constants + flattened)
    if not offloads:
        # Of Adam over lists of tensors: the square roots. ZeRO flattens the gradients of its part once more.
        temporary = owned if model.moments_per_parameter == 2 else 0
        yield at("update", gradients=2 * part if stage in (1, 2, 3) else whole, buffers=constants + temporary)
