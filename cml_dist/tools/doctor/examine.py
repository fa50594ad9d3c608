"""The list of checks, joining the world as a run would, and one list of what all ranks found."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from cml_dist.distributed.heartbeat import this_heartbeat
from cml_dist.errors import CmlError
from cml_dist.tools.doctor import checks
from cml_dist.tools.doctor.checks import Case, Finding, by_host

MAY_TAKE_S = 600.0
"""How long a check may take beyond ``parallel.hang_timeout_s``, before it counts as a hang."""

REACHABLE = (
    "open the machines' ports to each other (32768 and up: gloo and NCCL connect each pair on one that the kernel "
    "chooses), and name the network: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
)

Checks = Mapping[str, Callable[[Case], Iterable[Finding]]]

BEFORE_JOINING: Checks = {
    "versions": checks.check_versions,
    "GPU": checks.check_gpu,
    "shared memory": checks.check_shared_memory,
    "SLURM": checks.check_slurm,
}
"""Quick ones, since ranks wait for each other only so long; where joining fails, they may tell why."""

IN_THE_WORLD: Checks = {
    "second derivative": checks.check_second_derivative,
    "data": checks.check_data,
    "run folder": checks.check_run_folder,
}


def examine(case: Case, present: Callable[[list[Finding]], None]) -> bool:
    """Look at everything; returns, on all ranks, whether a run is ready to start: no finding is a fault.

    Rank 0 is given the findings to ``present``. Where the world cannot be joined, or breaks, these are why, and what
    was found before; the other ranks raise. Collective: all ranks.
    """
    host = socket.gethostname()

    def report(everyone: list[tuple[str, list[Finding]]]) -> bool:
        rows = merge(everyone)
        if case.here.rank == 0:
            present(rows)
        return all(row.verdict != "fault" for row in rows)

    own = look(BEFORE_JOINING, case)
    try:
        from cml_dist.distributed.world import joined_world

        with joined_world(case.config) as case.world:
            own += [*checks.check_world(case.world), *look(IN_THE_WORLD, case), *checks.share_run_folder(case)]
            # Presented before anybody leaves: a launcher ends all processes once one has left with a fault.
            return report(case.world.gather((host, own)))
    except Exception as error:
        this_heartbeat().blame(error)  # where another rank broke the world, that one is named instead
        if case.here.rank != 0:
            raise
        fault = failed("world", error)
        this_heartbeat().fail(fault.value, everywhere=isinstance(error, CmlError) and error.everywhere)
        if isinstance(error, RuntimeError):  # torch's, of a connection
            fault = replace(fault, remedy=REACHABLE)
        return report([(host, [*own, fault])])


def look(chosen: Checks, case: Case) -> list[Finding]:
    """The findings of this rank's checks. One that fails is a finding, and keeps no other from being made."""
    found: list[Finding] = []
    for name, check in chosen.items():
        if case.world is not None:
            case.world.heartbeat.beat(name, MAY_TAKE_S)
        try:
            for finding in check(case):  # those before a failure count
                found.append(finding)
        except Exception as error:
            found.append(failed(name, error))
    if case.world is not None:
        case.world.heartbeat.beat("the end of the checks")
    return found


def failed(name: str, error: Exception) -> Finding:
    """A check that raised: a known fault in its own words, all else with its type and place."""
    if isinstance(error, CmlError):
        return Finding(name, "fault", error.what, error.remedy)
    last, said = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())[:300]
    return Finding(name, "fault", f"{type(error).__name__}: {said} ({os.path.basename(last.filename)}:{last.lineno})")


def merge(everyone: Sequence[tuple[str, Iterable[Finding]]]) -> list[Finding]:
    """The findings of all ranks, given as (host, findings): equal ones once, what most ranks found before the others.

    Who deviates is named, and warned of a value that must be the same everywhere.
    """
    by_check: dict[str, dict[Finding, list[int]]] = {}
    for rank, (_, findings) in enumerate(everyone):
        for finding in findings:
            by_check.setdefault(finding.check, {}).setdefault(finding, []).append(rank)
    rows: list[Finding] = []
    for found in by_check.values():
        usual = max(found, key=lambda kind: len(found[kind]))
        for kind, ranks in sorted(found.items(), key=lambda one: one[0] != usual):
            row = replace(kind, ranks=tuple(ranks))
            if len(found) > 1 or (kind.verdict != "ok" and len(ranks) < len(everyone)):
                names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                row = replace(row, who=f"{names} {by_host(everyone[rank][0] for rank in ranks)}")
            if kind != usual and kind.alike and kind.verdict != "fault":
                value = f"{kind.value} instead of {usual.value}"
                row = replace(row, verdict="warning", value=value, remedy=kind.alike)
            rows.append(row)
    return rows
