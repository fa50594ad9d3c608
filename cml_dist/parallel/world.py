"""Who am I: rank, world and device, through Accelerate, checked against what was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    gather_object,
)

from cml_dist.config.schema import RunConfig
from cml_dist.errors import CmlError, WorldError
from cml_dist.parallel.allocator import give_back_freed_memory, keep_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all, and the few collectives that the trainer needs.

    Attributes:
        accelerator: Accelerate's view of the world; strategies use it.
        rank, size: this process, and how many there are.
        local_rank, local_size: the same on this machine.
        device: where this process computes.
    """

    accelerator: Accelerator
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a float64 vector over all ranks, on the CPU. Collective: all ranks."""
        if self.size == 1:
            return values.cpu()
        values = values.to(self.device, copy=True)
        torch.distributed.all_reduce(values)
        return values.cpu()

    def max(self, value: float) -> float:
        """Largest value over all ranks. Collective: all ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor.item()

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on each rank, and fail on all ranks with the first rank's error if it fails on any.

        ``work`` must hold no collective. Collective: all ranks.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # re-raised below, on every rank
            error = caught
        if self.size > 1:
            told = None if error is None else (self.rank, error if isinstance(error, CmlError) else None, repr(error))
            failures = [f for f in gather_object([told]) if f is not None]
            if failures and (error is None or isinstance(error, CmlError)):
                rank, known, text = failures[0]
                known = known or WorldError(f"rank {rank} failed: {text}", "see its own traceback")
                known.everywhere = True  # every rank raises it now
                raise known from error
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def main_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on each machine's first rank, then on its others (e.g. to fill a shared cache once)."""
        if self.local_rank == 0:
            result = self.together(work)
            return self.together(lambda: result)
        self.together(lambda: None)
        return self.together(work)

    def close(self) -> None:
        """Leave the process group. Collective: all ranks."""
        self.accelerator.end_training()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def join_world(config: RunConfig) -> World:
    """Meet the other processes, and make sure that they are those that were asked for.

    Raises:
        WorldError: fewer or more processes than ``parallel.processes`` or the launcher's WORLD_SIZE; or a launcher
            that set up something else than plain data parallelism.
    """
    _refuse_launch_of_one()
    use_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    if config.run.device == "cuda" and use_cpu:
        raise WorldError("run.device is cuda, but torch sees no GPU", "set run.device=auto, or mend the driver")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if not use_cpu and here > gpus:
        raise WorldError(
            f"{here} processes were launched on this machine, which has {gpus} GPUs",
            f"launch with --num_processes {gpus}, or set run.device=cpu",
        )
    launched = os.environ.get("WORLD_SIZE")
    # Accelerate takes a named backend as a promise that a process group will be there: none for a lone process.
    backend = None if os.environ.get("LOCAL_RANK") is None else "gloo" if use_cpu else "nccl"
    # Everything that Accelerate would read from environment variables is said here: none may change a result.
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision="no",
        # The plugin and not the number: ACCELERATE_GRADIENT_ACCUMULATION_STEPS overrides the number, and divides by it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=config.parallel.timeout_s)),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise WorldError(
            f"the launcher set up {accelerator.distributed_type.value}, "
            f"but parallel.strategy is {config.parallel.strategy}",
            "use launch/accelerate/cpu.yaml or ddp.yaml",
        )
    if (accelerator.device.type == "cpu") != use_cpu:
        raise WorldError(
            f"the launcher chose {accelerator.device}, but run.device is {config.run.device}",
            "unset ACCELERATE_USE_CPU, or set run.device=cpu",
        )
    size = accelerator.num_processes
    for asked, who in ((config.parallel.processes, "parallel.processes"), (launched and int(launched), "WORLD_SIZE")):
        if asked and asked != size:
            raise WorldError(
                f"{who} asks for {asked} processes, but the world has {size}",
                "launch with accelerate launch --config_file launch/accelerate/cpu.yaml (or ddp.yaml) --num_processes "
                f"{asked} -m cml_dist ..., or set parallel.processes={size}",
            )
    return World(
        accelerator=accelerator,
        rank=accelerator.process_index,
        size=size,
        local_rank=accelerator.local_process_index,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if size > 1 else 1,
        device=accelerator.device,
    )


def _refuse_launch_of_one() -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process alone; this is all it tells of the other."""
    launched = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if launched and not any(name in os.environ for name in sizes):
        raise WorldError(
            "several processes were asked for, but accelerate launch started one (it takes --cpu for one process)",
            "launch with accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes N -m cml_dist ...",
        )


def set_arithmetic(config: RunConfig, world: World) -> int:
    """Fix what changes the bits of a result, threads and kernels, and what slows it. Returns this process's threads."""
    threads = config.parallel.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    torch.set_num_threads(threads)  # whatever OMP_NUM_THREADS says
    if world.device.type == "cpu":
        # A budget is kept only by a process that holds no more than its tensors do.
        (keep_freed_memory if config.memory.budget_gib is None else give_back_freed_memory)()
    if config.run.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not deterministic
        # Some CUDA kernels (pooling, index adds) have no deterministic form: a warning, not a refusal.
        torch.use_deterministic_algorithms(True, warn_only=world.device.type == "cuda")
        torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return threads
