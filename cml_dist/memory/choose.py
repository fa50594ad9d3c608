"""The means that a memory budget allows: engine, micro-batch, and where the adapted copies lie."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import DomainConfig, RunConfig
from cml_dist.errors import ConfigError
from cml_dist.memory.footprint import Footprint, meta_step_footprint
from cml_dist.memory.strategies import ModelSize, RankBudget, Strategy, rank_budget
from cml_dist.meta.rule import Method
from cml_dist.nets.guard import couples_examples
from cml_dist.nets.network import CmlNet
from cml_dist.types import Batch, Episode

USABLE = 0.9
"""The part of a GPU's memory that a run may take: context, workspaces and the allocator's slack need the rest."""

GRAPH_ON_CPU = 3 * 2**30
"""Bytes of a meta-step up to which ``graph`` is taken on a CPU without a budget: there it was the faster engine.

Beyond, memory costs more than passes. Measured in benchmarks/2026-11-28-methods.md: faster up to 2.4 GiB, slower at 7.
"""


@dataclass(frozen=True)
class Means:
    """How a meta-step is computed, as far as memory goes; the value is the same for all."""

    engine: str
    micro_batch: int | None
    trajectory_device: str
    trajectory: str = "all"

    def __str__(self) -> str:
        pieces = "whole" if self.micro_batch is None else f"in micro-batches of {self.micro_batch}"
        kept = ", copies on the CPU" if self.trajectory_device == "cpu" else ""
        return f"{self.engine} {pieces}{kept}" + (", every sqrt(K)-th point kept" if self.trajectory == "sqrt" else "")

    def of(self, plan: RunPlan) -> RunPlan:
        """The plan with these means."""
        return replace(plan, **asdict(self))


@dataclass(frozen=True)
class Task:
    """What a domain says about memory: an episode's shapes, how they are known, and how outputs become losses."""

    episode: Episode
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    source: str = "the domain's"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.episode.query.inputs.shape[1:])

    @property
    def output_dim(self) -> int:
        """Of a learner: classes, or regression targets."""
        return self.episode.ways or self.episode.query.targets.shape[1]


def task_of(
    domain: DomainConfig,
    input_shape: tuple[int, ...],
    output_dim: int,
    dtype: torch.dtype,
    loss: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
) -> Task:
    """The task of a domain from its settings, on the meta device: no data is read. Shape and type: as prepared."""
    ways = getattr(domain, "ways", 0)  # regression has none

    def batch(each: int) -> Batch:
        count = each * (ways or 1)
        inputs = torch.empty(count, *input_shape, dtype=dtype, device="meta")
        labels = torch.empty(count, dtype=torch.int64, device="meta")
        return Batch(inputs, labels if ways else torch.empty(count, output_dim, dtype=dtype, device="meta"))

    return Task(Episode(batch(domain.shots), batch(domain.queries), "train", 0, ways=ways), loss, score)


class MemoryPlanner:
    """What a rank needs with any means under any strategy, and the first means that a budget allows.

    Args:
        plan: the run's so far.
        net: on any device, also ``meta``.
        on_gpu: whether the computing device has memory of its own. On the CPU offloading moves nothing out of the
            budget, and convolutions take scratch besides.

    Raises:
        ConfigError: micro-batches were asked for, and the network couples examples.
    """

    def __init__(
        self, config: RunConfig, plan: RunPlan, net: CmlNet, method: Method, task: Task, *, on_gpu: bool
    ) -> None:
        self.config, self.plan, self.net, self.method, self.task, self.on_gpu = config, plan, net, method, task, on_gpu
        self.coupled = couples_examples(net)
        if plan.micro_batch is not None and self.coupled:
            raise ConfigError(
                f"engine.micro_batch is {plan.micro_batch}, but model.backbone {config.model.backbone} couples "
                "examples of a batch by BatchNorm's batch statistics: parts of a batch would have others",
                "set engine.micro_batch=auto, or model.norm=frozen with pre-trained weights, or choose a backbone with "
                "LayerNorm or GroupNorm",
            )
        self.footprint = lru_cache(maxsize=None)(self._footprint)

    def need(self, strategy: Strategy, means: Means, world: int) -> RankBudget:
        """What a rank needs."""
        return rank_budget(strategy, model_size(self.config, self.net), self.footprint(means), world)

    def bytes_needed(self, strategy: Strategy, means: Means, world: int) -> int:
        """What counts against the budget."""
        need = self.need(strategy, means, world)
        return need.total + (0 if self.on_gpu else need.host)

    def candidates(self) -> list[Means]:
        """Every means that the configuration leaves open, from the fastest to the leanest."""
        engine, plan = self.config.engine, self.plan
        found = [Means(plan.engine, plan.micro_batch, plan.trajectory_device, plan.trajectory)]
        if plan.engine == "graph" and engine.name != "auto":
            return found
        lean = "adjoint" if plan.engine == "graph" else plan.engine
        copies = "cpu" if engine.trajectory_device == "cpu" and lean == "adjoint" else "device"
        sizes = self._micro_batches() if engine.micro_batch == "auto" and not self.coupled else [plan.micro_batch]
        kept = "sqrt" if engine.trajectory == "sqrt" and lean == "adjoint" else "all"
        found += [Means(lean, size, copies, kept) for size in [plan.micro_batch, *sizes]]
        if lean == "adjoint" and plan.inner_steps > 1:
            if self.on_gpu and engine.trajectory_device == "auto":
                found += [Means(lean, size, "cpu", kept) for size in sizes]
            elif copies == "device" and engine.trajectory == "auto" and plan.inner_steps > 3:
                found += [Means(lean, size, copies, "sqrt") for size in [plan.micro_batch, *sizes]]
        return list(dict.fromkeys(found))

    def choose(self, strategy: Strategy, world: int, budget: int) -> tuple[Means | None, int]:
        """The fastest means inside a budget of ``budget`` bytes, or None; and the bytes it (or the leanest) needs."""
        found = self.candidates()

        def fits(means: Means) -> bool:
            return self.bytes_needed(strategy, means, world) <= budget

        # Most runs fit as they are: that comes first. Of the rest each needs less than the one before, save where the
        # copies move to the CPU, and there the halving asks first.
        first = 0 if fits(found[0]) else bisect_left(found, True, lo=1, key=fits)
        means = found[first] if first < len(found) else None
        return means, self.bytes_needed(strategy, means or found[-1], world)

    def _micro_batches(self) -> list[int]:
        """Halves of the larger set, down to one example."""
        size = max(len(self.task.episode.support.targets), len(self.task.episode.query.targets))
        sizes = []
        while size > 1:
            size = (size + 1) // 2
            sizes.append(size)
        return sizes

    def _footprint(self, means: Means) -> Footprint:
        if means.trajectory == "sqrt":
            return self.footprint(replace(means, trajectory="all")).with_sqrt()
        return meta_step_footprint(
            self.net,
            self.task.loss,
            self.task.score,
            self.method,
            means.engine,
            self.task.episode,
            episodes=max(self.plan.episodes_by_rank),
            micro_batch=means.micro_batch,
            autocast=autocast_type(self.config),
            offload_path=means.trajectory_device == "cpu" and self.on_gpu,
            scratch=not self.on_gpu,
        )


def fit_memory(
    config: RunConfig,
    plan: RunPlan,
    net: CmlNet,
    method: Method,
    task: Task,
    device: torch.device,
    *,
    training: bool = True,
) -> RunPlan:
    """The plan with the fastest means that stay inside the memory budget, and the reason in words.

    Args:
        training: refuse what does not fit. A test needs neither moments nor a meta-gradient: it takes the leanest means
            instead.

    Raises:
        ConfigError: nothing fits (with the smallest budget that would), or micro-batches of a network that couples
            examples.

    Cost: nothing without a budget, else a few seconds for each means that is tried. Collective: none; every rank finds
    the same.
    """
    planner = MemoryPlanner(config, plan, net, method, task, on_gpu=device.type == "cuda")
    budget = memory_budget(config, device)
    found = planner.candidates()
    if budget is None:
        asks = config.engine.name == "auto" and plan.engine == "graph" and plan.inner_steps > 1 and training
        return found[1].of(plan) if asks and planner.footprint(found[0]).peak > GRAPH_ON_CPU else plan
    strategy = Strategy(plan.strategy, plan.offload)
    means, need = planner.choose(strategy, plan.processes, budget)
    if means is None and not training:
        return found[-1].of(plan)
    if means is None:
        smallest = -(-need * 1000 // 2**30) / 1000  # GiB to three decimals, never too few
        raise ConfigError(
            f"nothing fits into {budget / 2**30:.3f} GiB a process: the leanest, {found[-1]} under {strategy}, needs "
            f"{smallest:.3f} GiB",
            f"set memory.budget_gib to {smallest:.3f} or more, or a ZeRO strategy, fewer trained or adapting "
            "parameters (model.trained, method.adapts)",
        )
    words = f"{need / 2**30:.2f} of {budget / 2**30:.2f} GiB a process with {means}"
    if means != found[0]:
        whole = planner.bytes_needed(strategy, found[0], plan.processes)
        words += f" ({found[0]} would need {whole / 2**30:.2f})"
    return replace(means.of(plan), memory=words)


def memory_budget(config: RunConfig, device: torch.device) -> int | None:
    """Bytes that a process may use, None for no limit.

    The GPU's whole memory counts and not what is free just now: a run that is resumed must choose the same again.
    """
    if config.memory.budget_gib is not None:
        return int(config.memory.budget_gib * 2**30)
    return int(USABLE * torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def autocast_type(config: RunConfig) -> torch.dtype | None:
    """The type of the arithmetic inside the network, None for that of the parameters."""
    return torch.bfloat16 if config.run.precision == "bf16" else None


def model_size(config: RunConfig, net: CmlNet) -> ModelSize:
    """What the strategies share out."""
    dtype = getattr(torch, config.run.dtype)
    sizes = [p.numel() * dtype.itemsize for p in net.parameters()]
    sgd = config.optim.name == "sgd"
    return ModelSize(
        parameters=sum(sizes),
        largest=max(sizes),
        constants=sum(b.numel() * b.element_size() for b in net.buffers()),
        moments_per_parameter=(1 if config.optim.momentum else 0) if sgd else 2,
        element=dtype.itemsize,
    )
