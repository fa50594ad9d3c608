"""Know before you run: a configuration's memory and traffic under every strategy, without data, weights or a GPU."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cml_dist.config.plan import make_plan
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError
from cml_dist.memory.choose import USABLE, Means, MemoryPlanner, Task, task_of
from cml_dist.memory.strategies import STRATEGIES, RankBudget, Strategy
from cml_dist.nets.build import make_network, method_of
from cml_dist.nets.network import CmlNet
from cml_dist.registry import DOMAINS

LAUNCH_FILES = {
    Strategy("ddp"): "ddp",
    Strategy("zero1"): "zero1",
    Strategy("zero2"): "zero2",
    Strategy("zero3"): "zero3",
    Strategy("zero2", "optimizer"): "zero2-offload",
    Strategy("zero3", "optimizer"): "zero3-offload",  # and an option, see _command
    Strategy("zero3", "all"): "zero3-offload",
}
"""What may be recommended. ZeRO-0 is DDP's arithmetic in DeepSpeed's hands: a check, not a means."""


@dataclass(frozen=True)
class Forecast:
    """What a run would need on each rank.

    Attributes:
        usable_gib: of each GPU: ``memory.budget_gib``, or nine tenths of it.
        num_parameters, num_constants: elements that are meta-trained, and that are not.
        episodes_per_rank: of a meta-step, on the busiest rank.
        rows, means: a budget a strategy, and the fastest means that fit it, else the leanest.
        recommended, command: number of the row to use, and what starts it; None where nothing fits.
        smallest_gib: the GPU memory (or budget) with which the leanest strategy would fit, where nothing fits.
    """

    gpus: int
    gpu_memory_gib: float
    usable_gib: float
    inputs: tuple[int, ...]
    input_source: str
    num_parameters: int
    num_constants: int
    episodes_per_rank: int
    rows: tuple[RankBudget, ...]
    means: tuple[Means, ...]
    recommended: int | None
    command: str | None
    smallest_gib: float | None

    def fits(self, row: RankBudget) -> bool:
        return row.total <= self.usable_gib * 2**30

    def as_dict(self) -> dict[str, Any]:
        """For JSON; memory in bytes."""
        rows = [{**asdict(row), "total": row.total, "fits": self.fits(row)} for row in self.rows]
        return {**asdict(self), "rows": rows}


def forecast(
    config: RunConfig,
    gpus: int,
    gpu_memory_gib: float,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    words: Sequence[str] = (),
) -> Forecast:
    """Every strategy's budget for ``config`` on ``gpus`` GPUs, and the fastest one that fits.

    Args:
        image_size, channels: see :func:`known_inputs`.
        words: configuration and overrides as they were typed, for the command.

    Raises:
        ConfigError: the size of the images is not known; ``parallel.processes`` asks for another world.

    Cost: seconds to a minute; memory of Python and torch alone.
    """
    _check(config, gpus, gpu_memory_gib)
    inputs = known_inputs(config, image_size, channels)
    net = network_structure(config, inputs)
    # Strategies are what is compared here; the plan is asked for the rest.
    parallel = config.parallel.model_copy(update={"strategy": "auto", "offload": "auto"})
    plan = make_plan(config.model_copy(update={"parallel": parallel}), gpus, {})
    planner = MemoryPlanner(config, plan, net, method_of(config, net), inputs, on_gpu=True)
    usable = config.memory.budget_gib or USABLE * gpu_memory_gib
    strategies = [s for s in STRATEGIES if (s.name == "single") == (gpus == 1) or (gpus == 1 and s.offload != "none")]
    leanest = planner.candidates()[-1]
    means = tuple(planner.choose(s, gpus, int(usable * 2**30))[0] or leanest for s in strategies)
    rows = tuple(planner.need(s, m, gpus) for s, m in zip(strategies, means, strict=True))
    # Fewest bytes first, then what computes as a whole; the order of STRATEGIES decides between equals.
    fitting = [n for n, row in enumerate(rows) if row.total <= usable * 2**30 and _can_launch(strategies[n], config)]
    order = planner.candidates().index
    recommended = min(fitting, key=lambda n: (rows[n].sent, order(means[n]), n), default=None)
    command = smallest = None
    if recommended is None:
        smallest = min(planner.need(s, leanest, gpus).total for s in strategies) / 2**30
        smallest /= 1 if config.memory.budget_gib else USABLE
    else:
        command = _command(strategies[recommended], gpus, words)
    return Forecast(
        gpus=gpus,
        gpu_memory_gib=gpu_memory_gib,
        usable_gib=usable,
        inputs=inputs.shape,
        input_source=inputs.source,
        num_parameters=sum(p.numel() for p in net.parameters()),
        num_constants=sum(b.numel() for b in net.buffers()),
        episodes_per_rank=max(plan.episodes_by_rank),
        rows=rows,
        means=means,
        recommended=recommended,
        command=command,
        smallest_gib=smallest,
    )


def _check(config: RunConfig, gpus: int, gpu_memory_gib: float) -> None:
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}", "give the number of GPUs, 1 or more")
    if not gpu_memory_gib > 0:
        raise ConfigError(f"--gpu-memory-gib is {gpu_memory_gib:g}", "give the memory of one GPU in GiB, above 0")
    asked = config.parallel.processes
    if asked not in (None, gpus):
        raise ConfigError(f"parallel.processes is {asked}, but --gpus is {gpus}", f"set parallel.processes={gpus}")


def network_structure(config: RunConfig, inputs: Task) -> CmlNet:
    """The network without values: pre-trained weights change no size, and are neither read nor fetched."""
    with torch.device("meta"):
        net = make_network(config, inputs.shape, inputs.output_dim, structure_only=True)
    return net.to(getattr(torch, config.run.dtype))


# --------------------------------------------------------------------------- shapes of an episode


def known_inputs(config: RunConfig, image_size: int | None = None, channels: int | None = None) -> Task:
    """What a run reads, as far as it is known without its data: on the meta device.

    Args:
        image_size, channels: of the images; None: those of the packed set, or the usual ones of the named set.

    Raises:
        ConfigError: the size of the images is not known.
    """
    domain, dtype = config.domain, getattr(torch, config.run.dtype)
    if not hasattr(domain, "ways"):
        from cml_dist.data.sinusoid import SinusoidDomain as Domain

        shape, source, outputs = Domain.input_shape, "the domain's", Domain.output_dim
    else:
        from cml_dist.data.images import ImageDomain as Domain

        (shape, source), outputs = _image_shape(config, image_size, channels), domain.ways
    return replace(task_of(domain, shape, outputs, dtype, Domain.loss, Domain.score), source=source)


def _image_shape(config: RunConfig, image_size: int | None, channels: int | None) -> tuple[tuple[int, ...], str]:
    """(channels, height, width), and how it is known."""
    name, root = config.domain.name, config.domain.root
    if name != "glyphs" and root is not None and os.path.isdir(root):
        from cml_dist.data.shards import ShardSet

        shards = ShardSet.open(root)
        shape, source = (shards.channels, *shards.image_size), f"of the set in {root}"
    elif DOMAINS[name].usual_inputs is not None:
        shape, source = DOMAINS[name].usual_inputs, f"usual for {name}"
    elif image_size is None or channels is None:
        raise ConfigError(
            f"the size of the images is not known: domain.name is {name}, and domain.root {root} is no folder here",
            "give --image-size PIXELS and --channels 1 or 3, or a domain.root that is here",
        )
    else:
        shape, source = (channels, image_size, image_size), "as given"
    if image_size is None and channels is None:
        return shape, source
    size = shape[1:] if image_size is None else (image_size, image_size)
    return (channels or shape[0], *size), f"as given, else {source}"


# --------------------------------------------------------------------------- the command


def _can_launch(strategy: Strategy, config: RunConfig) -> bool:
    if strategy.stage is not None and config.run.dtype != "float32":
        return False  # DeepSpeed reduces and updates in float32
    return strategy.name == "single" or strategy in LAUNCH_FILES


def _command(strategy: Strategy, gpus: int, words: Sequence[str]) -> str:
    ours = [f"parallel.strategy={strategy.name}"]
    if strategy.stage in (2, 3):
        ours.append(f"parallel.offload={strategy.offload}")
    theirs = [word for word in words if word.partition("=")[0] not in ("parallel.strategy", "parallel.offload")]
    rest = shlex.join([*theirs, *ours])
    if strategy.name == "single":
        return f"cml-dist train {rest}"
    file = f"launch/accelerate/{LAUNCH_FILES[strategy]}.yaml"
    if strategy == Strategy("zero3", "optimizer"):
        file += " --offload_param_device none"
    return f"accelerate launch --config_file {file} --num_processes {gpus} -m cml_dist train {rest}"
