"""The processes of a run: how this one joins them, through Accelerate, and the collectives of the trainer."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    gather_object,
)

from cml_dist.config.plan import make_plan
from cml_dist.config.schema import RunConfig
from cml_dist.data.cores import usable_cores
from cml_dist.distributed.allocator import give_back_freed_memory, keep_freed_memory
from cml_dist.distributed.deepspeed import deepspeed_config, deepspeed_plugin, zero_stage
from cml_dist.distributed.env import Launched, check_launch, forget_others, launched, threads_asked
from cml_dist.distributed.exit import name_failure_before_sigterm
from cml_dist.distributed.heartbeat import Heartbeat, set_heartbeat, this_heartbeat
from cml_dist.distributed.rank_heartbeat import heartbeat_alone
from cml_dist.distributed.rendezvous import GROUP_TIMEOUT, choose_interface, meet, this_member
from cml_dist.errors import CmlError, WorldError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all, and the few collectives that the trainer needs.

    Attributes:
        accelerator: Accelerate's view of the world; strategies use it.
        rank, size: this process, and how many there are.
        local_rank, local_size: the same on this machine.
        device: where this process computes.
        heartbeat: knows where this rank and the others are.
    """

    accelerator: Accelerator
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all ranks, on the CPU. Collective: all ranks."""
        if self.size == 1:
            return values.cpu()
        values = values.to(self.device, copy=True)
        with self.heartbeat.waiting():
            torch.distributed.all_reduce(values)
            return values.cpu()

    def start_sum(self, values: torch.Tensor) -> Callable[[], list[float]]:
        """Begin to put the sums over all ranks in their place; the returned function waits for them, and gives them.

        The caller's heartbeat waits for the other ranks meanwhile. Collective: all ranks, here.
        """
        sent = torch.distributed.all_reduce(values, async_op=True) if self.size > 1 else None
        arrived = None
        if values.device.type != "cpu":
            if sent is not None:
                sent.wait()  # the stream does, and not the host
            values, sent, arrived = values.to("cpu", non_blocking=True), None, torch.cuda.Event()
            arrived.record()

        def read() -> list[float]:
            if sent is not None:
                sent.wait()
            if arrived is not None:
                arrived.synchronize()
            return values.tolist()

        return read

    def average(self, values: list[torch.Tensor]) -> None:
        """Put the mean over all ranks in the place of each tensor. Collective: all ranks."""
        if self.size > 1:
            with self.heartbeat.waiting():
                for sent in [torch.distributed.all_reduce(value, async_op=True) for value in values]:
                    sent.wait()
            for value in values:
                value.div_(self.size)

    def max(self, value: float) -> float:
        """Largest value over all ranks. Collective: all ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        with self.heartbeat.waiting():
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
            return tensor.item()

    def gather(self, value: T) -> list[T]:
        """A small value of each rank, in order, on all ranks. Collective: all ranks."""
        if self.size == 1:
            return [value]
        with self.heartbeat.waiting():
            return gather_object([value])

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
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
            failures = [f for f in self.gather(told) if f is not None]
            if failures and (error is None or isinstance(error, CmlError)):
                rank, known, text = failures[0]
                known = known or WorldError(f"rank {rank} failed: {text}", "see its own traceback")
                known.everywhere = True  # every rank raises it now
                raise known from error
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def run_on_main(self, work: Callable[[], object]) -> None:
        """Run ``work`` on rank 0; where it fails, it fails on all ranks. Collective: all ranks."""
        self.run_on_all_ranks(work if self.is_main else lambda: None)

    def assert_same_across_ranks(self, facts: dict[str, Any]) -> None:
        """Refuse to go on where the processes were not started alike: each machine has a command line of its own.

        Args:
            facts: by name what must be the same everywhere, such as settings and versions.

        Raises:
            WorldError: on all ranks, naming the first difference.

        Collective: all ranks.
        """
        if self.size == 1:
            return
        (host, first), *others = self.gather((socket.gethostname(), facts))
        for rank, (there, other) in enumerate(others, 1):
            for name in sorted({**first, **other}):
                if first.get(name) != other.get(name):
                    raise WorldError(
                        f"the processes were not started alike: {name} is {first.get(name)!r} at rank 0 on {host}, but "
                        f"{other.get(name)!r} at rank {rank} on {there}",
                        "start all with the same command, in the same environment",
                    )

    def local_main_process_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on each machine's first rank, then on its others (e.g. to fill a shared cache once)."""
        first = self.local_rank == 0
        result = self.run_on_all_ranks(work if first else lambda: None)
        return self.run_on_all_ranks((lambda: result) if first else work)

    def close(self) -> None:
        """Leave the process group once all are here; the heartbeat goes on to the end. Collective: all ranks."""
        self.heartbeat.beat("the end")
        self.max(0.0)  # who does not come is named
        self.heartbeat.beat("leaving the process group")
        self.accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self.heartbeat.outlast()
        self.heartbeat.close()


def join_world(config: RunConfig) -> World:
    """Meet the other processes, and make sure that they are those that were asked for.

    Raises:
        WorldError: another number of processes than ``parallel.processes``, several worlds where one was meant, a
            launcher that set up another strategy or device, or a device without the arithmetic of ``run.precision``.
        NetworkError: this machine has no way to rank 0's.
    """
    here = check_launch(config.parallel.processes)
    forget_others()
    use_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    if config.run.device == "cuda" and use_cpu:
        raise WorldError("run.device is cuda, but torch sees no GPU", "set run.device=auto, or mend the driver")
    gpus = torch.cuda.device_count()
    if not use_cpu and here.local_size > gpus:
        raise WorldError(
            f"{here.local_size} processes were launched on this machine, which has {gpus} GPUs",
            f"launch {gpus} a machine, or set run.device=cpu",
        )
    if config.run.precision == "tf32" and (lacks := _lacks_tf32(use_cpu, here.local_rank)):
        raise WorldError(f"run.precision is tf32, which {lacks} does not have", "set run.precision=fp32 or bf16")
    plan = make_plan(config, here.size, os.environ)
    if here.size > here.local_size:
        choose_interface(here.host, here.port)
    by_deepspeed = zero_stage(plan.strategy) is not None
    _join_group(config, here, use_cpu, by_deepspeed)
    dictionary = deepspeed_config(config, plan, os.environ) if by_deepspeed else {}
    with deepspeed_plugin(dictionary, use_cpu) if by_deepspeed else nullcontext() as plugin:
        accelerator = _accelerator(use_cpu, plugin)
    kind, device, size = accelerator.distributed_type, accelerator.device, accelerator.num_processes
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    as_planned = kind in ((DistributedType.DEEPSPEED,) if by_deepspeed else plain)
    if not as_planned or (device.type == "cpu") != use_cpu or size != here.size:
        raise WorldError(
            f"the launcher set up {kind.value} on {device} with {size} processes, but the run has {plan.strategy} on "
            f"{'cpu' if use_cpu else 'cuda'} with {here.size}",
            "use cml-dist launch local, or a file of cml-dist launch files DIR; for CPUs alone set run.device=cpu",
        )
    return World(
        accelerator=accelerator,
        rank=accelerator.process_index,
        size=size,
        local_rank=here.local_rank,
        local_size=here.local_size,
        device=device,
        heartbeat=this_heartbeat(),
    )


@contextmanager
def joined_world(config: RunConfig) -> Iterator[World]:
    """The world of :func:`join_world`, left in order at the end; a process that is alone has a heartbeat too.

    After an error nothing is left in order: the others may never come, and a process group would wait for them.

    Collective: all ranks.
    """
    with heartbeat_alone(this_member(0), config.parallel.hang_timeout_s) if launched().size == 1 else nullcontext():
        world = join_world(config)
        yield world
        world.close()


def _lacks_tf32(use_cpu: bool, gpu: int) -> str:
    """The device of this process, where it has no TF32; else empty."""
    if use_cpu:
        return "the CPU"
    major, minor = torch.cuda.get_device_capability(gpu)
    return "" if major >= 8 else f"{torch.cuda.get_device_name(gpu)} (compute capability {major}.{minor}, below 8.0)"


def _join_group(config: RunConfig, here: Launched, use_cpu: bool, by_deepspeed: bool) -> None:
    """Meet the other ranks, and make the process group that Accelerate and DeepSpeed then find.

    The heartbeat comes first, so that no rank waits in vain for another, neither in torch's own rendezvous nor later. A
    lone process needs a group for DeepSpeed alone.
    """
    if torch.distributed.is_initialized() or (here.size == 1 and not by_deepspeed):
        return
    if here.size == 1:
        heartbeat, store = this_heartbeat(), torch.distributed.HashStore()
    else:
        heartbeat, store = meet(config.parallel)
        set_heartbeat(heartbeat)
        name_failure_before_sigterm(heartbeat)
    heartbeat.beat("the start of the process group")
    with heartbeat.waiting():
        torch.distributed.init_process_group(
            "gloo" if use_cpu else "nccl",
            store=store,
            rank=here.rank,
            world_size=here.size,
            timeout=GROUP_TIMEOUT,
            # Without it barriers warn that they have to guess the GPU.
            device_id=None if use_cpu else torch.device("cuda", here.local_rank),
        )


def _accelerator(use_cpu: bool, plugin: DeepSpeedPlugin | None) -> Accelerator:
    """Accelerate, told all that it would read from environment variables: none of them may change a result."""
    # Accelerate takes a named backend as a promise that a process group will be there: none for a lone process.
    backend = None if os.environ.get("LOCAL_RANK") is None else "gloo" if use_cpu else "nccl"
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # set_arithmetic decides
    return Accelerator(
        # DeepSpeed's world on CPUs is not Accelerate's: cpu=True would leave DeepSpeed out, silently.
        cpu=use_cpu and plugin is None,
        mixed_precision="no",
        # The plugin and not the number: ACCELERATE_GRADIENT_ACCUMULATION_STEPS overrides the number, and divides by it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        deepspeed_plugin=plugin,
        kwargs_handlers=[
            InitProcessGroupKwargs(backend=backend, timeout=GROUP_TIMEOUT),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )


def set_arithmetic(config: RunConfig, world: World) -> int:
    """Fix what changes the bits of a result, threads and kernels, and what slows it. Returns this process's threads."""
    threads = config.parallel.threads or threads_asked() or max(1, usable_cores() // world.local_size)
    torch.set_num_threads(threads)
    if world.device.type == "cpu":
        # A budget is kept only by a process that holds no more than its tensors do.
        (keep_freed_memory if config.memory.budget_gib is None else give_back_freed_memory)()
    if config.run.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not deterministic
        # Some CUDA kernels (pooling, index adds) have no deterministic form: a warning, not a refusal.
        torch.use_deterministic_algorithms(True, warn_only=world.device.type == "cuda")
        torch.backends.cudnn.benchmark = False
        # Every new tensor would be filled besides, for code that reads what nobody wrote: no kernel here does.
        torch.utils.deterministic.fill_uninitialized_memory = False
    # For the whole process. The names of torch 2.6: newer ones (fp32_precision) must not be mixed with them.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.run.precision == "tf32"
    return threads


def crowded_cores(threads: int, local_size: int) -> str | None:
    """A warning where the processes of this machine have more threads together than cores."""
    cores = usable_cores()
    if threads * local_size <= cores:
        return None
    fair = max(1, cores // local_size)
    remedies = [f"set parallel.threads={fair}"] * (threads > fair) + [f"start at most {cores}"] * (local_size > cores)
    return (
        f"{local_size} process{'es' * (local_size != 1)} of {threads} thread{'s' * (threads != 1)} share {cores} "
        f"core{'s' * (cores != 1)}, so that a step may take many times as long; {' and '.join(remedies)}"
    )
