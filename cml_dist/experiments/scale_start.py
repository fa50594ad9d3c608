"""Start a cell of a scaling study in fresh processes: on this machine, as a step of SLURM, or beside a launcher's."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cml_dist.distributed.env import Launched, environment_of
from cml_dist.experiments.scale import Cell
from cml_dist.tools.local import start_logged

GRACE_S = 60.0
"""The failure detector needs less, but at the start processes would wait for a missing one much longer."""

Start = Callable[[Cell], list[int]]
"""Starts a cell's processes, and returns their exit codes."""


def command(cell: Cell) -> list[str]:
    """What each process of a cell runs."""
    return [sys.executable, "-m", "cml_dist", "scale", *cell.words]


def run_cell(cell: Cell, start: Start, is_main: bool = True) -> str:
    """Measure a cell; returns why it failed, or nothing. Under a launcher collective: all of its processes."""
    if is_main:
        cell.file.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(cell.run_dir, ignore_errors=True)
    begun = cell.log.stat().st_size if cell.log.exists() else 0
    codes = start(cell)
    if not is_main:
        return ""
    shutil.rmtree(cell.run_dir, ignore_errors=True)
    if not any(codes) and cell.is_measured:
        cell.log.unlink(missing_ok=True)
        return ""
    said = cell.log.read_bytes()[begun:].decode(errors="replace")
    return (re.findall("^error: (.*)", said, re.M) or [f"its processes ended with {codes}; see {cell.log}"])[0]


@dataclass(frozen=True)
class Here:
    """Processes of this machine, each on cores of its own (or a GPU, by its local rank)."""

    cores: int

    def __call__(self, cell: Cell) -> list[int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ours, started = sorted(os.sched_getaffinity(0)), []
        try:
            for rank in range(cell.world):
                place = environment_of(Launched(rank, cell.world, rank, cell.world, "127.0.0.1", port))
                own = ours[rank * self.cores : (rank + 1) * self.cores]
                started.append(start_logged(command(cell), cell.log, place, own, signal.SIGKILL))
            return _ended(started)
        finally:
            for process in started:
                process.kill()
                process.wait()


def _ended(started: Sequence[subprocess.Popen]) -> list[int]:
    """Exit codes, once all have ended; where one fails the others have ``GRACE_S`` to end by themselves."""
    end_s = math.inf
    while None in (codes := [process.poll() for process in started]) and time.monotonic() < end_s:
        if any(codes):
            end_s = min(end_s, time.monotonic() + GRACE_S)
        time.sleep(0.1)
    return [-9 if code is None else code for code in codes]


@dataclass(frozen=True)
class Srun:
    """A step of the SLURM job that this process is in: on its cores and GPUs as srun deals them out."""

    cores: int | None

    def __call__(self, cell: Cell) -> list[int]:
        cores = [f"--cpus-per-task={self.cores}", "--cpu-bind=cores"] if self.cores else []
        srun = ["srun", f"--ntasks={cell.world}", *cores, "--mpi=none", "--kill-on-bad-exit=1", "--export=ALL"]
        process = start_logged([*srun, *command(cell)], cell.log, os.environ, (), signal.SIGKILL)
        try:
            return [process.wait()]
        finally:
            process.terminate()
            process.wait()


class Beside:
    """A fresh process beside each of a launcher's, or the first of them. Collective: all of the launcher's."""

    def __init__(self, here: Launched) -> None:
        import torch.distributed

        from cml_dist.distributed.rendezvous import GROUP_TIMEOUT, choose_interface

        self.here, self._group = here, torch.distributed
        if here.size > here.local_size:
            choose_interface(here.host, here.port)
        self._group.init_process_group("gloo", timeout=GROUP_TIMEOUT)

    def agreed(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        told = [value]
        self._group.broadcast_object_list(told)
        return told[0]

    def __call__(self, cell: Cell) -> list[int]:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = self.agreed(probe.getsockname()[1])
        here, process = self.here, None
        if here.rank < cell.world:
            local_size = min(here.local_size, cell.world - (here.rank - here.local_rank))
            place = here._replace(size=cell.world, local_size=local_size, port=port)
            process = start_logged(command(cell), cell.log, environment_of(place), (), signal.SIGKILL)
        try:
            codes = [0] * here.size
            self._group.all_gather_object(codes, process.wait() if process else 0)
            return codes
        finally:
            if process:
                process.kill()
                process.wait()

    def close(self) -> None:
        self._group.destroy_process_group()
