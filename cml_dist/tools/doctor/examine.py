"""The list of checks, and their order: what needs no world, joining it as a run would, and what is found in it."""

from __future__ import annotations

import os
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from cml_dist.distributed.heartbeat import this_heartbeat
from cml_dist.errors import CmlError
from cml_dist.tools.doctor import installed, machine, run
from cml_dist.tools.doctor.findings import Case, Finding, Report, by_host, merge

if TYPE_CHECKING:
    from cml_dist.distributed.world import World

VERSIONS, MACHINE, WORLD, MODEL, STORAGE = GROUPS = ("versions", "machine", "world", "model and data", "storage")
"""Headings, in the order in which they are shown."""

MAY_TAKE_S = 600.0
"""How long a check may take beyond ``parallel.hang_timeout_s``, before it counts as a hang."""

REDUCED_BYTES = 2**24
SLOW_MB_PER_S = 50.0
REACHABLE = (
    "open the machines' ports to each other (32768 and up: gloo and NCCL connect each pair on one that the kernel "
    "chooses), and name the network: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
)


class Check(NamedTuple):
    """A function that yields findings, shown under a heading; every rank calls it, each machine's first, or rank 0."""

    group: str
    name: str
    run: Callable[[Case], Iterable[Finding]]
    where: Literal["rank", "machine", "main"]


BEFORE_JOINING = (
    Check(VERSIONS, "versions", installed.check_versions, "rank"),
    Check(MACHINE, "GPU", machine.check_gpu, "rank"),
    Check(MACHINE, "memory", machine.check_memory, "machine"),
    Check(WORLD, "SLURM", machine.check_slurm, "main"),
)
"""Quick ones, since ranks wait for each other only so long; where joining fails, they may tell why."""

IN_THE_WORLD = (
    Check(VERSIONS, "DeepSpeed", installed.check_deepspeed, "machine"),
    Check(MODEL, "second derivative", run.check_second_derivative, "machine"),
    Check(MODEL, "data", run.check_data, "machine"),
    Check(STORAGE, "run folder", run.check_run_folder, "main"),
)


def examine(case: Case, present: Callable[[Report], None], progress: Callable[[str], None] = lambda name: None) -> bool:
    """Look at everything; returns, on all ranks, whether a run is ready to start.

    Where the world cannot be joined, or breaks, rank 0 presents why and what was found before; the others raise.

    Args:
        present: shows the report, on rank 0.
        progress: told the name of each check.

    Collective: all ranks.
    """
    started_s, host = time.monotonic(), socket.gethostname()

    def report(everyone: list[tuple[str, list[Finding]]]) -> bool:
        hosts = {rank: host for rank, (host, _) in enumerate(everyone)}
        rows = merge({rank: found for rank, (_, found) in enumerate(everyone)}, hosts)
        rows.sort(key=lambda row: GROUPS.index(row.group))
        made = Report(rows, hosts, case, time.monotonic() - started_s)
        if case.here.rank == 0:
            present(made)
        return made.ready

    own = look(BEFORE_JOINING, case, progress)
    try:
        progress("the world")
        from cml_dist.distributed.world import joined_world

        with joined_world(case.config) as case.world:
            own += [replace(finding, group=WORLD) for finding in check_world(case.world)]
            own += look(IN_THE_WORLD, case, progress)
            own += [replace(finding, group=STORAGE) for finding in run.see_run_folder(case)]
            # Presented before anybody leaves: a launcher ends all processes once one has left with a fault.
            return report(case.world.gather((host, own)))
    except Exception as error:
        this_heartbeat().blame(error)  # where another rank broke the world, that one is named instead
        if case.here.rank != 0:
            raise
        fault = replace(failed("world", error), group=WORLD)
        this_heartbeat().fail(fault.value, everywhere=isinstance(error, CmlError) and error.everywhere)
        if isinstance(error, RuntimeError):  # torch's, of a connection
            fault = replace(fault, remedy=REACHABLE)
        return report([(host, [*own, fault])])


def look(checks: Iterable[Check], case: Case, progress: Callable[[str], None] = lambda name: None) -> list[Finding]:
    """The findings of this rank's checks. One that fails is a finding, and keeps no other from being made."""
    found: list[Finding] = []
    for check in checks:
        if (check.where == "machine" and case.here.local_rank > 0) or (check.where == "main" and case.here.rank > 0):
            continue
        progress(check.name)
        if case.world is not None:
            case.world.heartbeat.beat(check.name, MAY_TAKE_S)
        try:
            for finding in check.run(case):
                found.append(replace(finding, group=check.group))
        except Exception as error:
            found.append(replace(failed(check.name, error), group=check.group))
    if case.world is not None:
        case.world.heartbeat.beat("the end of the checks")
    return found


def failed(name: str, error: Exception) -> Finding:
    """A check that raised: a known fault in its own words, all else with its type and place."""
    if isinstance(error, CmlError):
        return Finding(name, "fault", error.what, error.remedy)
    last, said = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())[:300]
    return Finding(name, "fault", f"{type(error).__name__}: {said} ({os.path.basename(last.filename)}:{last.lineno})")


# --------------------------------------------------------------------------- the world


def check_world(world: World) -> Iterator[Finding]:
    """Who is there, and the time of a sum over all ranks, by what sums gradients. Collective: all ranks."""
    import torch

    if world.size == 1:
        yield Finding("world", "ok", f"one process alone, on {world.device}")
        return
    hosts = dict(enumerate(world.gather(socket.gethostname())))
    backend = "gloo" if world.device.type == "cpu" else "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    value = f"all {world.size} processes joined by {backend} {by_host(hosts)}"
    yield Finding("world", "ok", value, alike=installed.ALIKE)
    world.heartbeat.beat("the all-reduce")
    runs = [_all_reduce(world) for _ in range(4)][1:]  # the first one connects
    seconds, right = statistics.median(seconds for seconds, _ in runs), all(right for _, right in runs)
    speed = REDUCED_BYTES / seconds / 1e6
    value = f"{REDUCED_BYTES >> 20} MiB in {1e3 * seconds:.3g} ms ({speed:,.0f} MB/s)"
    verdict, remedy = "ok", ""
    if not right:
        value, verdict = f"{value}, with a WRONG sum", "fault"
        remedy = "do not train on this: update the driver, NCCL or torch; try run.device=cpu"
    elif speed < SLOW_MB_PER_S:
        value, verdict = f"{value}: slow for gradients", "warning"
        remedy = "name the fast network: GLOO_SOCKET_IFNAME=... (NCCL_SOCKET_IFNAME=...); look at cables and switches"
    yield Finding("all-reduce", verdict, value, remedy, data={"mb_per_s": speed, "seconds": seconds, "right": right})


def _all_reduce(world: World) -> tuple[float, bool]:
    """The slowest rank's seconds, and whether all ranks have the right sum. Collective: all ranks."""
    import torch

    data = torch.full((REDUCED_BYTES // 4,), world.rank + 1.0, device=world.device)
    with world.heartbeat.waiting():
        torch.distributed.barrier()
        started_s = time.perf_counter()
        torch.distributed.all_reduce(data)
        data[0].item()  # waits for a GPU
        seconds = time.perf_counter() - started_s
    return world.max(seconds), world.max(float((data != world.size * (world.size + 1) / 2).any())) == 0.0
