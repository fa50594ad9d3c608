"""``run.profile=A:B``: where time and memory of these meta-steps go, in files for the usual viewers."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from cml_dist.config.schema import RunConfig
from cml_dist.distributed.world import World
from cml_dist.telemetry.console import Console

TOP = 5
"""Operators in the table."""

ALLOCATIONS = 100_000
"""The last so many of a GPU are in its snapshot, each with its Python stack: a few hundred MB."""

SPAN = "meta-step"


class StepProfile:
    """The meta-steps that ``run.profile`` names, as far as this start makes them; nothing where it names none.

    Each rank writes its own files when the last of these steps is done, or when training ends before. A context.

    Args:
        folder: where the files go.
        done: meta-steps done before this start.
    """

    def __init__(self, config: RunConfig, world: World, console: Console, folder: Path, done: int) -> None:
        self._world, self._console, self._folder = world, console, folder
        asked = config.run.profiled_steps
        self._steps = range(max(asked.start, done + 1), asked.stop)
        self._last = 0  # of them that began
        self._profiler: profile | None = None
        if asked and not self._steps:
            console.note(f"run.profile is {config.run.profile}, but {done} meta-steps are done: nothing is profiled")

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._end()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Round meta-step ``number``."""
        if number not in self._steps:
            yield
            return
        if self._profiler is None:
            self._begin()
        self._last = number
        with record_function(f"{SPAN} {number}"):
            yield
        if number == self._steps[-1]:
            self._end()

    @property
    def _on_gpu(self) -> bool:
        return self._world.device.type == "cuda"

    def _begin(self) -> None:
        # The profiler's C++ part speaks on the terminal whenever it begins and ends.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        profiler = profile(activities=activities, profile_memory=True, record_shapes=True)
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=ALLOCATIONS)
        profiler.start()
        self._profiler = profiler  # now there is something to end

    def _end(self) -> None:
        profiler, self._profiler = self._profiler, None
        self._world.heartbeat.beat("writing the profile")
        name = f"steps_{self._steps[0]}-{self._last}.rank{self._world.rank}"
        trace, memory = self._folder / f"{name}.trace.json.gz", self._folder / f"{name}.memory.pickle"
        try:
            profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(memory))
            write_trace(profiler, trace)
        except (OSError, RuntimeError) as error:  # a run does not end for it, nor in another way than it was to
            self._console.warn(f"the profile could not be written: {error}")
            return
        finally:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)
        self._show(profiler)
        self._console.note(f"Trace: {trace}, for https://ui.perfetto.dev or chrome://tracing")
        if self._on_gpu:
            self._console.note(f"Memory: {memory}, for https://pytorch.org/memory_viz")

    def _show(self, profiler: profile) -> None:
        """The operators that took most time."""
        key, where = ("self_device_time_total", "GPU") if self._on_gpu else ("self_cpu_time_total", "CPU")
        # Kernels are there a second time, under their own names.
        events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
        found = sorted(((getattr(event, key), event) for event in events), key=lambda one: -one[0])
        total = sum(us for us, _ in found)
        if not total:
            self._console.warn("the profiler saw no kernel: see whether this user may read the GPU's counters")
            return
        most = [(us, event) for us, event in found if not event.key.startswith(SPAN)][:TOP]
        rows = [(event.key, f"{us / 1e3:,.1f}", f"{us / total:.0%}", event.count) for us, event in most]
        first, last = self._steps[0], self._last
        steps = f"meta-step {first}" if first == last else f"meta-steps {first} to {last}"
        columns = ("operator", f"ms on the {where}", "share", "calls")
        self._console.table(f"Most time in {steps}", columns, rows, least=("calls",))


def write_trace(profiler: profile, path: Path) -> None:
    """Write a Chrome trace, with memory as a curve besides: its events alone are shown as dots."""
    plain = path.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    trace = json.loads(plain.read_bytes())
    trace["traceEvents"] += [_on_curve(event) for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        json.dump(trace, file)
    plain.unlink()


def _on_curve(event: dict[str, Any]) -> dict[str, Any]:
    told = event["args"]
    device = "CPU" if told["Device Type"] == 0 else f"GPU {told['Device Id']}"
    counted = {"bytes": told["Total Allocated"]}
    return {"ph": "C", "name": f"memory of {device}", "pid": event["pid"], "ts": event["ts"], "args": counted}
