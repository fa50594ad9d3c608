"""The means that a memory budget allows: engine, micro-batch, and where the adapted copies lie."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from cml_dist.config.methods import has_upper_ascent, is_classifier
from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.data.base import Domain
from cml_dist.errors import ConfigError
from cml_dist.memory.footprint import Footprint, meta_step_footprint
from cml_dist.memory.live_bytes import bytes_of
from cml_dist.memory.strategies import ModelSize, RankBudget, Strategy, rank_budget
from cml_dist.meta.gradient import Engine
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


MEANS = ("engine", "micro_batch", "trajectory_device", "trajectory")
"""What of a :class:`RunPlan` decides how much memory a meta-step takes; its value is the same for all."""


def in_words(plan: RunPlan) -> str:
    """The means of a plan, for people."""
    pieces = "whole" if plan.micro_batch is None else f"in micro-batches of {plan.micro_batch}"
    kept = ", copies on the CPU" if plan.trajectory_device == "cpu" else ""
    return f"{plan.engine} {pieces}{kept}" + (", every sqrt(K)-th point kept" if plan.trajectory == "sqrt" else "")


def engine_of(plan: RunPlan) -> Engine:
    """The engine that a plan names."""
    return Engine(plan.engine, plan.trajectory, torch.device("cpu") if plan.trajectory_device == "cpu" else None)


@dataclass(frozen=True)
class KnownInputs:
    """What memory asks of a :class:`Domain`, as far as it is known without its data; ``source`` says how."""

    input_shape: tuple[int, ...]
    output_dim: int
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    source: str
    largest_episode: Callable[[torch.dtype], Episode | None] = lambda dtype: None


class MemoryPlanner:
    """What a rank needs by any means under any strategy, and the first means that a budget allows.

    Args:
        plan: the run's so far.
        net: on any device, also ``meta``.
        on_gpu: whether the computing device has memory of its own. On the CPU offloading moves nothing out of the
            budget, and convolutions take scratch besides.

    Raises:
        ConfigError: micro-batches were asked for, and the network couples examples.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: RunPlan,
        net: CmlNet,
        method: Method,
        domain: Domain | KnownInputs,
        *,
        on_gpu: bool,
    ) -> None:
        self.config, self.plan, self.net, self.method, self.domain = config, plan, net, method, domain
        self.on_gpu, self.episode = on_gpu, _episode(config, domain)
        self.coupled = couples_examples(net)
        if plan.micro_batch is not None and self.coupled:
            raise ConfigError(
                f"engine.micro_batch is {plan.micro_batch}, but model.backbone {config.model.backbone} couples "
                "examples of a batch by BatchNorm's batch statistics: parts of a batch would have others",
                "set engine.micro_batch=auto, or model.norm=frozen with pre-trained weights, or choose a backbone with "
                "LayerNorm or GroupNorm",
            )
        self.footprint = lru_cache(maxsize=None)(self._footprint)

    def need(self, strategy: Strategy, means: RunPlan, world: int) -> RankBudget:
        """What a rank needs."""
        return rank_budget(strategy, model_size(self.config, self.net), self.footprint(means), world)

    def bytes_needed(self, strategy: Strategy, means: RunPlan, world: int) -> int:
        """What counts against the budget."""
        need = self.need(strategy, means, world)
        return need.total + (0 if self.on_gpu else need.host)

    def candidates(self) -> list[RunPlan]:
        """The plan by every means that the configuration leaves open, from the fastest to the leanest."""
        asked, plan = self.config.engine, self.plan
        if plan.engine == "graph" and asked.name != "auto":
            return [plan]
        lean = replace(plan, engine="adjoint") if plan.engine == "graph" else plan
        sizes = [plan.micro_batch]
        if asked.micro_batch == "auto" and not self.coupled:  # halves of the larger set, down to one example
            size, sizes = max(len(batch.targets) for batch in self.episode.batches), []
            while size > 1:
                size = (size + 1) // 2
                sizes.append(size)
        found = [plan, lean, *(replace(lean, micro_batch=size) for size in sizes)]
        if lean.engine == "adjoint" and self.method.steps > 1:
            if self.on_gpu and asked.trajectory_device == "auto":
                found += [replace(lean, micro_batch=size, trajectory_device="cpu") for size in sizes]
            elif lean.trajectory_device == "device" and asked.trajectory == "auto" and self.method.steps > 3:
                sqrt = replace(lean, trajectory="sqrt")
                found += [sqrt, *(replace(sqrt, micro_batch=size) for size in sizes)]
        return list(dict.fromkeys(found))

    def choose(self, strategy: Strategy, world: int, budget: int) -> RunPlan | None:
        """The fastest candidate inside a budget of ``budget`` bytes, None where there is none."""
        found = self.candidates()

        def fits(means: RunPlan) -> bool:
            return self.bytes_needed(strategy, means, world) <= budget

        if fits(found[0]):  # as most runs do
            return found[0]
        # With the same copies each candidate needs less than the one before.
        for _, alike in groupby(found[1:], key=lambda means: (means.trajectory, means.trajectory_device)):
            group = list(alike)
            if fits(group[-1]):
                return group[bisect_left(group, True, key=fits)]
        return None

    def _footprint(self, means: RunPlan) -> Footprint:
        engine = engine_of(means)
        return meta_step_footprint(
            self.net,
            self.domain.loss,
            self.domain.score,
            self.method,
            engine if self.on_gpu else replace(engine, device=None),
            self.episode,
            episodes=max(self.plan.episodes_by_rank),
            micro_batch=means.micro_batch,
            autocast=autocast_type(self.config),
            scratch=not self.on_gpu,
        )


def _episode(config: RunConfig, domain: Domain | KnownInputs) -> Episode:
    """Shapes and types of an episode, as the domain prepares it, on the meta device: no data is read."""
    ways = getattr(config.domain, "ways", 0)  # regression has none
    dtype = getattr(torch, config.run.dtype)
    if (largest := domain.largest_episode(dtype)) is not None:
        return largest

    def batch(each: int, classes: int = ways or 1) -> Batch:
        count = each * classes
        targets = torch.empty(count, dtype=torch.int64) if ways else torch.empty(count, domain.output_dim, dtype=dtype)
        return Batch(torch.empty(count, *domain.input_shape, dtype=dtype), targets)

    with torch.device("meta"):
        if is_classifier(config):
            inputs = torch.empty(config.domain.batch, *domain.input_shape, dtype=dtype)
            query = Batch(inputs, torch.empty(config.domain.batch, dtype=torch.int64))
            return Episode(query.map(lambda values: values[:0]), query, "train", 0, ways=domain.output_dim)
        each = getattr(config.domain, "unlabelled", 0)
        unlabelled = batch(each, ways + config.domain.distractors) if each else None
        sets = batch(config.domain.shots), batch(config.domain.queries)
        return Episode(*sets, "train", 0, ways=ways, unlabelled=unlabelled)


def fit_memory(
    config: RunConfig,
    plan: RunPlan,
    net: CmlNet,
    method: Method,
    domain: Domain,
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
    planner = MemoryPlanner(config, plan, net, method, domain, on_gpu=device.type == "cuda")
    budget = memory_budget(config, device)
    found = planner.candidates()
    if budget is None:
        asks = config.engine.name == "auto" and plan.engine == "graph" and method.steps > 1 and training
        return found[1] if asks and planner.footprint(plan).peak > GRAPH_ON_CPU else plan
    strategy = Strategy(plan.strategy, plan.offload)
    means = planner.choose(strategy, plan.processes, budget)
    if means is None and not training:
        return found[-1]
    need = planner.bytes_needed(strategy, means or found[-1], plan.processes)
    if means is None:
        smallest = -(-need * 1000 // 2**30) / 1000  # GiB to three decimals, never too few
        raise ConfigError(
            f"nothing fits into {budget / 2**30:.3f} GiB a process: the leanest, {in_words(found[-1])} under "
            f"{strategy}, needs {smallest:.3f} GiB",
            f"set memory.budget_gib to {smallest:.3f} or more, or a ZeRO strategy, fewer trained or adapting "
            "parameters (model.trained, method.adapts)",
        )
    words = f"{need / 2**30:.2f} of {budget / 2**30:.2f} GiB a process with {in_words(means)}"
    if means != plan:
        whole = planner.bytes_needed(strategy, plan, plan.processes)
        words += f" ({in_words(plan)} would need {whole / 2**30:.2f})"
    return replace(means, memory=words)


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
    itemsize = getattr(torch, config.run.dtype).itemsize
    sizes = [p.numel() * itemsize for p in net.parameters()]
    sgd = config.optim.name == "sgd"
    return ModelSize(
        parameters=sum(sizes),
        largest=max(sizes),
        constants=sum(map(bytes_of, net.buffers())),
        moments_per_parameter=(1 if config.optim.momentum else 0) if sgd else 2,
        reductions=1 + (config.optim.clip_value is not None) + has_upper_ascent(config),
    )
