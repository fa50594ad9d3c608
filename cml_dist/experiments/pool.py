"""Runs of a sweep on this machine, so many at once: each in fresh processes, on GPUs or cores of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from cml_dist.experiments.sweep import Job, seconds_a_step, steps_done
from cml_dist.run.folder import RunFolder
from cml_dist.run.interrupts import STOPPED_BY_SCHEDULER, STOPPED_BY_USER
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.text import duration, measured
from cml_dist.tools.local import PASSED_ON, heard, start_logged

TICK_S = 0.5
"""Between two looks at the runs."""

MEASURED_STEPS, MEASURE_S = 4, 120.0
"""A measurement ends after so many meta-steps, or seconds."""


class Place(NamedTuple):
    """What one run of several has of this machine: GPUs, as CUDA_VISIBLE_DEVICES names them, and cores."""

    gpus: tuple[str, ...]
    cores: tuple[int, ...]

    def __str__(self) -> str:
        count, what = (len(self.gpus), "GPU") if self.gpus else (len(self.cores), "core")
        return f"{count} {what}{'s' * (count != 1)}"


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return [*(named or map(str, range(torch.cuda.device_count())))][: torch.cuda.device_count()]


def places(at_once: int, processes: int, gpus: Sequence[str]) -> list[Place]:
    """A place for each of so many runs; more runs than GPUs share them, in turn."""
    cores, found = sorted(os.sched_getaffinity(0)), []
    for k in range(at_once):
        own = cores[k * len(cores) // at_once : (k + 1) * len(cores) // at_once]
        taken = {gpus[(k * processes + n) % len(gpus)]: None for n in range(processes)} if gpus else ()
        found.append(Place(tuple(taken), tuple(own or cores)))
    return found


def start(words: Sequence[str], place: Place, log: Path) -> subprocess.Popen:
    """A command in its place, with what it says at the end of ``log``."""

    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(place.gpus)} if place.gpus else {})}
    # Of a pool that is killed no run is left behind: it stops and saves.
    return start_logged(words, log, environment, place.cores, signal.SIGTERM)


def measure(job: Job, place: Place) -> float | None:
    """Seconds of a meta-step, by a few of the run in a folder that is removed; None: it did not come so far."""
    if job.config.all_splits:  # several runs, in folders of their own
        return None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = RunFolder(Path(folder, "run"))
        child = start(job.command(f"run.dir={run.path}", "run.trackers=[]"), place, Path(folder, "log"))
        try:
            end_s = time.monotonic() + MEASURE_S
            while child.poll() is None and steps_done(run) < MEASURED_STEPS and time.monotonic() < end_s:
                time.sleep(TICK_S / 5)
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(MEASURE_S)
        finally:
            child.kill()
            child.wait()
        return seconds_a_step(run)


def work_off(jobs: Sequence[Job], where: Sequence[Place], console: Console) -> int:
    """Train all jobs, so many at once as there are places; returns the exit code.

    The first signal has the runs stop and save, and no other begins; a second Ctrl-C ends them at once.
    """
    waiting, free, running, past, code, told = deque(jobs), list(where), [], 0, 0, 0
    name = f"{len(jobs)} run{'s' * (len(jobs) != 1)}"
    heeded = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]  # under nohup not all
    steps = sum(job.config.train.steps for job in jobs)
    with heard("the runs stop and save", heeded) as came, console.progress(name, steps) as whole:
        while running or (waiting and not came):
            while waiting and free and not came:
                running.append(_Training(waiting.popleft(), free.pop(0), console))
            time.sleep(TICK_S)
            if len(came) > told:
                told = len(came)
                for each in running:
                    each.process.send_signal(signal.SIGTERM if came.count(signal.SIGINT) < 2 else signal.SIGKILL)
            for each in running:
                each.look()
            over, running = [e for e in running if e.ended], [e for e in running if not e.ended]
            for each in over:
                free.append(each.place)
                past += each.step
                code = max(code, each.tell(stopping=bool(came)))
            if over or console.interactive:  # lines without end are of no use
                whole.update(past + sum(each.step for each in running) + sum(job.step for job in waiting))
    return code if not came else STOPPED_BY_USER if signal.SIGINT in came else STOPPED_BY_SCHEDULER


class _Training:
    """A run that is trained in ``place``: how far it is, and whether its process has ended."""

    def __init__(self, job: Job, place: Place, console: Console) -> None:
        self.job, self.place, self.step, self.ended = job, place, job.step, False
        self._console, self._shown, self._view = console, ExitStack(), None
        self._from, self._began_s = job.log.stat().st_size if job.log.exists() else 0, time.monotonic()
        self.process = start(job.command(), place, job.log)
        console.note(f"{'Going on with' if job.step else 'Started'} {job.name}")
        if console.interactive:  # a line of each now and then would say little
            self._view = self._shown.enter_context(console.progress(job.name, job.config.train.steps))

    def look(self) -> None:
        """See how far it is."""
        self.ended, self.step = self.process.poll() is not None, steps_done(self.job.folder)
        if self._view is not None:
            self._view.update(self.step)

    def tell(self, stopping: bool) -> int:
        """Say how it has ended; returns 1 where it failed."""
        self._shown.close()
        code, name = self.process.returncode, self.job.name
        if code == 0:
            result, test = "", self.job.folder.own_test()
            with suppress(LookupError, TypeError):  # not tested (eval.final=false)
                result = ": " + measured(test["score"], test["meta"]["mean"], test["meta"]["ci95"], 2)
            self._console.note(f"Finished {name} in {duration(time.monotonic() - self._began_s)}{result}")
        elif stopping or code in (STOPPED_BY_SCHEDULER, STOPPED_BY_USER):
            self._console.note(f"Stopped {name} after step {self.step:,} of {self.job.config.train.steps:,}")
        else:
            said = self.job.log.read_bytes()[self._from :].decode(errors="replace")
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            why = re.findall("^error: (.*)", said, re.M) or [f"{ended}; see {self.job.log}"]
            self._console.warn(f"Failed {name}: {why[-1]}")
            return 1
        return 0
