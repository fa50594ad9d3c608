"""A cell of a scaling study, in the processes that are measured: a few meta-steps of the real trainer, and their parts.

Whatever follows an event of :mod:`cml_dist.run.hooks` up to the next one is a part of the step, on each rank:

- *data*: from asking for an episode until it is here;
- *compute*: the meta-gradient of this rank's episodes, with reductions inside it (``optim.clip_value``, ascents);
- *reduction*: of the meta-gradient over the ranks. Whoever comes last waits for nobody: the shortest of the ranks'
  is the reduction itself, and what the others take longer is *waiting* for slower ranks;
- *rest*: the outer step, metrics, what is written.

On a GPU each part ends when the device is done.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from cml_dist.atomic import write_text
from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.data.set_shape import known_shape
from cml_dist.distributed.allocator import give_back_freed_memory, peak_since_settled, settled_memory
from cml_dist.distributed.world import World, joined_world
from cml_dist.experiments.scale import MEMORY_STEPS
from cml_dist.memory.choose import MemoryPlanner, in_words, model_size
from cml_dist.memory.forecast import known_inputs, network_structure
from cml_dist.memory.strategies import Strategy
from cml_dist.nets.build import method_of
from cml_dist.run.folder import RunFolder
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.metrics import read_metrics

ENDS = {"drawn": "data", "computed": "compute", "reduced": "reduction"}
"""What is over at an event; an episode's computing ends where the next one is asked for."""

PARTS = ("data", "compute", "reduction", "rest")

SMALL = 50
"""Sums of one number after the meta-steps, of which the first fifth does not count."""

TCP_INFO_BYTES, BYTES_ACKED = 192, slice(120, 128)
"""Of ``struct tcp_info``, see tcp(7) and linux/tcp.h."""


class Stopwatch:
    """A hook that tells a rank's seconds apart; its memory is measured in the last two meta-steps, which do not count.

    Resident memory is what tensors take only where what is freed is given back (see ``distributed/allocator.py``).

    Attributes:
        steps: seconds by part, of each meta-step after ``warm_up`` but the last two.
        sent: bytes in those steps.
        rise: bytes of memory above the level between two steps; on a GPU all that tensors took at most.
    """

    def __init__(self, world: World, warm_up: int, last: int) -> None:
        self.device, self.warm_up, self.last = world.device, warm_up, last
        self.steps: list[dict[str, float]] = []
        self.rise = self.sent = 0
        self._now, self._before, self._since_s = dict.fromkeys(PARTS, 0.0), "", 0.0

    def __call__(self, step: int, what: str) -> None:
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(self.device)
        part = "compute" if (self._before, what) == ("drawn", "episode") else ENDS.get(what, "rest")
        self._now[part] += time.perf_counter() - self._since_s
        if what == "step":
            timed = self.last - MEMORY_STEPS
            if self.warm_up < step <= timed:
                self.steps.append(self._now)
            if step in (self.warm_up, timed):
                self.sent = sent_bytes() - self.sent
            if step >= timed:
                self.rise = torch.cuda.max_memory_allocated() if gpu else peak_since_settled() - self.rise
                if step < self.last and not gpu:
                    give_back_freed_memory()
                    self.rise = settled_memory()
        if what in ("step", "started"):
            self._now = dict.fromkeys(PARTS, 0.0)
        self._before, self._since_s = what, time.perf_counter()


def measure_cell(config: RunConfig, warm_up: int, out: Path, console: Console) -> None:
    """Train ``train.steps`` meta-steps, and have rank 0 write to ``out`` what they took.

    The file holds for each rank seconds by part of each step, bytes sent by TCP, and the rise of its memory; beside
    them what ``cml-dist plan`` foresees.

    Collective: all ranks.
    """
    with joined_world(config) as world:
        watch = Stopwatch(world, warm_up, config.train.steps)
        train(config, console, on_step=watch, world=world)
        own = {"steps": watch.steps, "sent": watch.sent, "rise": watch.rise, "small": small_reductions(world)}
        ranks = world.gather({"host": socket.gethostname(), **own})
    if world.is_main:
        (session,) = read_metrics(RunFolder(config.run.dir).sessions_file)
        kept = {key: session[key] for key in ("time", "versions", "commit", "hardware", "threads", "parameters")}
        found = {**kept, **foreseen(config, session["plan"], world), "ranks": ranks}
        write_text(out, json.dumps(found, indent=1) + "\n")


def small_reductions(world: World) -> list[float]:
    """Seconds of sums of one number over all ranks, which latency alone decides. Collective: all ranks."""
    seconds, number = [], torch.zeros(1)
    for _ in range(SMALL if world.size > 1 else 0):
        began_s = time.perf_counter()
        world.sum(number)
        seconds.append(time.perf_counter() - began_s)
    return seconds[SMALL // 5 :]


def foreseen(config: RunConfig, plan: dict[str, Any], world: World) -> dict[str, Any]:
    """What ``cml-dist plan`` says of the busiest rank under this plan: bytes of memory, and sent in a meta-step."""
    plan_ = RunPlan(**{**plan, "episodes_by_rank": tuple(plan["episodes_by_rank"])})
    inputs = known_inputs(known_shape(config))
    net = network_structure(config, inputs)
    on_gpu = world.device.type == "cuda"
    planner = MemoryPlanner(config, plan_, net, method_of(config, net), inputs, on_gpu=on_gpu)
    strategy, size = Strategy(plan_.strategy, plan_.offload), model_size(config, net)
    need = planner.need(strategy, plan_, plan_.processes)
    return {
        "strategy": str(strategy),
        "by": in_words(plan_),
        "episodes_by_rank": plan["episodes_by_rank"],
        "inputs": inputs.input_shape,
        "planned_memory": need.total,
        # Between two steps: parameters, moments, constants, and the meta-gradient; a GPU's allocator counts them.
        "resident": 0 if on_gpu else need.parameters + need.moments + size.constants + size.parameters,
        "planned_sent": need.sent,
        "reduced_bytes": size.reductions * size.parameters,
        "reductions": size.reductions,
    }


def sent_bytes() -> int:
    """Bytes that this process's TCP connections have delivered so far; not NCCL's over NVLink or InfiniBand."""
    total = 0
    for connection in psutil.Process().net_connections("tcp"):
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as found:
            info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            total += int.from_bytes(info[BYTES_ACKED], "little")
    return total
