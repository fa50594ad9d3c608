"""The order of an examination.

Who is there (by ``board.py``: plain TCP) -> joining the world as a run would -> the ring -> clocks -> the shared
folder -> every process's own checks -> all findings to rank 0. Each step has a time limit on every rank, and each says
what it found even where the one before it failed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.config.load import merge as merge_settings
from cml_dist.config.load import parse_config
from cml_dist.config.schema import RunConfig
from cml_dist.doctor.board import Board
from cml_dist.doctor.check import Case, Check, Hung, failed, in_time, run_check
from cml_dist.doctor.findings import Finding, Row, listed, merge, names
from cml_dist.doctor.gpus import check_gpus, check_own_gpu
from cml_dist.doctor.machine import check_cores, check_limits, check_memory, check_shared_memory
from cml_dist.doctor.model import check_backbone, check_data
from cml_dist.doctor.place import Place, place_of
from cml_dist.doctor.report import Report
from cml_dist.doctor.slurm import check_slurm
from cml_dist.doctor.storage import check_run_folder, check_temporary_folder, parameter_bytes
from cml_dist.doctor.versions import check_deepspeed, check_torch, check_versions
from cml_dist.errors import CmlError, WorldError

if TYPE_CHECKING:
    from cml_dist.parallel.world import World

VERSIONS, MACHINE, WORLD, MODEL, STORAGE = "versions", "machine", "world", "model and data", "storage"
GROUPS = (VERSIONS, MACHINE, WORLD, MODEL, STORAGE)
"""Headings, in the order in which they are shown."""

CHECKS = (
    Check(VERSIONS, "versions", check_versions, "rank"),
    Check(VERSIONS, "torch build", check_torch, "rank"),
    Check(VERSIONS, "DeepSpeed", check_deepspeed, limit_s=120),
    Check(MACHINE, "GPUs", check_gpus, limit_s=120),
    Check(MACHINE, "GPU", check_own_gpu, "rank", limit_s=120),
    Check(MACHINE, "CPU cores", check_cores, "rank"),
    Check(MACHINE, "memory", check_memory),
    Check(MACHINE, "shared memory", check_shared_memory),
    Check(MACHINE, "limits", check_limits, "rank"),
    Check(WORLD, "SLURM", check_slurm, "main"),
    Check(MODEL, "second derivative", check_backbone, limit_s=600),
    Check(MODEL, "data", check_data, limit_s=300),
    Check(STORAGE, "run folder", check_run_folder, "main"),
    Check(STORAGE, "temporary folder", check_temporary_folder),
)
"""What each process looks at by itself."""

JOIN_S, RING_S, SHARED_S = 60.0, 60.0, 90.0
GRACE_S = 15.0
"""What a rank waits for the others beyond their own limits."""

REACHABLE = (
    "open the machines' ports to each other (32768 and up: gloo and NCCL connect each pair on one that the kernel "
    "chooses), and name the network: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
)
"""What to do where the ranks met at MASTER_ADDR, but do not reach one another."""

NOT_CONFIGURED = {"domain": {"name": "sinusoid"}, "model": {"backbone": "mlp"}}
"""Where no configuration is named: its domain and model are not looked at."""


def bare_config(overrides: Sequence[str] = ()) -> RunConfig:
    """A configuration that carries nothing but the settings of a world."""
    return parse_config(merge_settings(NOT_CONFIGURED, overrides), source="the command line")


def examine(
    config: RunConfig,
    configuration: str | None,
    run_dir: str,
    progress: Callable[[int, str], None] = lambda done, step: None,
) -> tuple[Report | None, int, bool]:
    """Look at this process's machine, and with all others at the world.

    Args:
        config: of the run that is to come, or :func:`bare_config`.
        configuration: its name; None where none was given.
        run_dir: the folder to look at.
        progress: called as ``progress(steps done, the next one)``; there are :func:`num_steps`.

    Returns:
        the report (rank 0; None elsewhere), the exit code of every rank, and whether something hangs in a thread
        still, so that the process must be ended by ``os._exit``.

    Raises:
        WorldError: this rank did not find the others.

    Collective: all ranks, which need not all come.
    """
    started = time.monotonic()
    place = place_of()
    case = Case(config, configuration is not None, Path(run_dir), place)
    found: list[Finding] = []
    done = iter(range(num_steps()))

    def begin(step: str) -> None:
        progress(next(done), step)

    begin("meeting")
    board, places = _meet(case, found)
    if board is not None:
        found += _world_findings(case, board, places, begin)
    for check in CHECKS:
        if check.concerns(place):
            begin(check.name)
            found += run_check(check, case)
    if board is None:
        report = _report(case, {0: found}, places, configuration, started) if place.rank == 0 else None
        return report, 1, bool(case.hung)
    if place.rank != 0:
        board.say("found", [finding.as_dict() for finding in found])
        code = _verdict_of_main(board)
        board.say("bye")
        return None, code, bool(case.hung)
    heard = _hear_findings(board, places, found)
    report = _report(case, heard, places, configuration, started)
    board.say("verdict", report.exit_code)
    board.hear_all("bye", [rank for rank in heard if rank != 0], GRACE_S)  # the store may be this process's own
    return report, report.exit_code, bool(case.hung)


def num_steps() -> int:
    """Steps of this process's examination."""
    place = place_of()
    together = len(TOGETHER) if place.size > 1 else 1
    return 1 + together + sum(check.concerns(place) for check in CHECKS)


# --------------------------------------------------------------------------- who is there


def _meet(case: Case, found: list[Finding]) -> tuple[Board | None, dict[int, Place]]:
    """The board, and those who came; alone where torch itself is missing."""
    place = case.place
    try:
        board = in_time(lambda: Board.open(place, JOIN_S), 2 * JOIN_S)
    except WorldError:
        raise
    except Exception as error:  # torch itself is missing or broken
        found.append(replace(failed("torch", error), group=VERSIONS))
        return None, {place.rank: place}
    board.say("here", place.as_dict())
    if place.rank == 0:
        words = board.hear_all("here", range(place.size), JOIN_S)
        board.say("roll", sorted(words))
        places = {rank: Place(**word) for rank, word in sorted(words.items())}
    else:
        try:
            roll = board.hear("roll", 0, 2 * JOIN_S + GRACE_S)
        except TimeoutError as error:
            fault = WorldError(f"rank {place.rank} on {place.host} waited for rank 0 in vain: {error}", "start it too")
            fault.everywhere = False
            raise fault from error
        places = {rank: Place(**board.hear("here", rank, GRACE_S)) for rank in roll}
    return board, places


# --------------------------------------------------------------------------- all together


def _world_findings(case: Case, board: Board, places: dict[int, Place], begin: Callable[[str], None]) -> list[Finding]:
    """The steps that take several processes; what rank 0 says of them, and faults of this rank."""
    place, found = case.place, []
    absent = [rank for rank in range(place.size) if rank not in places]
    if place.rank == 0 and place.size > 1:
        found += [replace(finding, group=WORLD) for finding in _layout(places, place.size, absent)]
    if absent:  # the world cannot be joined, and a ring with a gap would only be waited for
        return found
    for name, group, step, limit_s in TOGETHER if place.size > 1 else TOGETHER[:1]:
        begin(name)
        try:
            made = in_time(lambda step=step: list(step(case, board, places)), limit_s)
        except Hung as hung:
            case.hung.append(name)
            made = [Finding(name, "fault", str(hung), "see what the other ranks say of it")]
        except TimeoutError as error:
            made = [Finding(name, "warning", str(error), "see what that rank says; start the doctor again")]
        except Exception as error:
            made = [failed(name, error)]
        found += [replace(finding, group=group) for finding in made]
    return found


def _layout(places: dict[int, Place], size: int, absent: list[int]) -> Iterator[Finding]:
    """Who came, and whether the machines have as many processes each."""
    if absent:
        word = "rank" if len(absent) == 1 else "ranks"
        yield Finding(
            "processes",
            "fault",
            f"{word} {listed(absent)} of {size} did not come within {JOIN_S:.0f} s; ring and shared folder not checked",
            "start every process, and see whether their machines reach MASTER_ADDR",
        )
        return
    hosts: dict[str, int] = {}
    for place in places.values():
        hosts[place.host] = hosts.get(place.host, 0) + 1
    value = f"{size}, all came: " + ", ".join(f"{count} on {host}" for host, count in hosts.items())
    wrong = [place.rank for place in places.values() if place.local_size != hosts[place.host]]
    if wrong:
        yield Finding(
            "processes",
            "warning",
            f"{value}; {names(wrong, places)} was told {places[wrong[0]].local_size} a machine",
            "set LOCAL_WORLD_SIZE and LOCAL_RANK by machine, or use accelerate launch: they share out GPUs and cores",
        )
    elif len(set(hosts.values())) > 1:
        yield Finding("processes", "note", value, "the machine with most sets the pace, if they are alike")
    else:
        yield Finding("processes", "ok", value)
    inward = [place.host for place in places.values() if place.address.startswith("127.") or not place.address]
    if len(hosts) > 1 and inward and "GLOO_SOCKET_IFNAME" not in os.environ:
        value = f"on {', '.join(dict.fromkeys(inward))} the machine's own name leads to itself alone (127.x) or nowhere"
        remedy = "set GLOO_SOCKET_IFNAME to the network between the machines, or mend /etc/hosts there"
        yield Finding("names", "warning", value, remedy)


def _join_and_measure(case: Case, board: Board, places: dict[int, Place]) -> Iterator[Finding]:
    """Join the world as a run would, and measure the ring."""
    from cml_dist.parallel.world import join_world

    place = case.place
    # Longer than our own limits: NCCL or the watch would end the process, and with it what it has to say.
    limits = {"timeout_s": 3600.0, "join_timeout_s": JOIN_S, "silence_s": 600.0}
    parallel = case.config.parallel.model_copy(update=limits)
    config = case.config.model_copy(update={"parallel": parallel})

    def others_failed() -> bool:
        return any(board.heard("join-failed", rank) for rank in places if rank != place.rank)

    try:
        world = in_time(lambda: join_world(config), JOIN_S, others_failed)
    except Hung as hung:
        case.hung.append("world")
        if others_failed():
            return  # that rank says why
        yield Finding("world", "fault", f"joining it {hung}", REACHABLE)
        return
    except Exception as error:
        board.say("join-failed")
        if isinstance(error, CmlError):
            raise
        yield replace(failed("world", error), remedy=REACHABLE)
        return
    if place.size == 1:
        yield Finding("world", "ok", f"one process alone, on {world.device}")
        return
    problem = _measure(case, board, places, world)
    world.watch.close()  # from here on a rank that dies is a finding of the others, and not their end
    if problem is not None:
        board.say("ring-problem", problem)
    if place.rank == 0:
        yield from _judge_ring(case, board, places, "NCCL" if world.device.type == "cuda" else "gloo", problem)


def _measure(case: Case, board: Board, places: dict[int, Place], world: World) -> str | None:
    """This rank's part of the ring; returns what went wrong."""
    from cml_dist.doctor.ring import measure_ring

    def another_failed() -> bool:
        return any(board.heard("ring-failed", rank) for rank in places if rank != case.place.rank)

    try:
        in_time(lambda: measure_ring(world, board), RING_S, another_failed)
    except Hung as hung:
        case.hung.append("ring")
        return str(hung)
    except Exception as error:
        board.say("ring-failed")
        return failed("ring", error).value
    return None


def _judge_ring(
    case: Case, board: Board, places: dict[int, Place], backend: str, problem: str | None
) -> Iterator[Finding]:
    """Rank 0's findings on what all ranks measured, as far as they came."""
    from cml_dist.doctor import ring

    at = board.hear_all("at", places, GRACE_S)
    pairs = [
        ring.Pair(**board.hear("pair", first, GRACE_S))
        for each in ring.neighbours(len(places))
        for first, _ in each
        if board.heard("pair", first)
    ]
    reduced = ring.Reduced(**board.hear("reduced", 0, GRACE_S)) if board.heard("reduced", 0) else None
    yield from ring.ring_findings(pairs, reduced, backend, places, parameter_bytes(case))
    problems = {rank: board.hear("ring-problem", rank, GRACE_S) for rank in places if board.heard("ring-problem", rank)}
    if problem is not None or problems:
        yield ring.hang_finding(problem or next(iter(problems.values())), at, places)


def _clocks(case: Case, board: Board, places: dict[int, Place]) -> Iterator[Finding]:
    from cml_dist.doctor import clock

    firsts = {}
    for place in places.values():
        firsts.setdefault(place.host, place.rank)
    others = [rank for rank in firsts.values() if rank != 0]
    if case.place.rank in others:
        clock.ask_time(board)
    if case.place.rank == 0:
        yield from clock.clock_findings(clock.tell_time(board, others), places)


def _folder(case: Case, board: Board, places: dict[int, Place]) -> Iterator[Finding]:
    from cml_dist.doctor import shared_folder

    if case.place.rank != 0:
        shared_folder.find_folder(board, case.run_dir)
        return
    others = [rank for rank in places if rank != 0]
    try:
        words = shared_folder.show_folder(board, case.run_dir, others)
    except OSError:
        return  # check_run_folder says why
    yield from shared_folder.folder_findings(words, case.run_dir, places)


TOGETHER = (
    ("world", WORLD, _join_and_measure, JOIN_S + RING_S + GRACE_S),
    ("clocks", WORLD, _clocks, SHARED_S),
    ("same folder", STORAGE, _folder, SHARED_S),
)
"""What takes several processes: name, heading, step, and seconds after which it is given up."""


# --------------------------------------------------------------------------- all findings on rank 0


def _hear_findings(board: Board, places: dict[int, Place], own: list[Finding]) -> dict[int, list[Finding]]:
    """The findings of all ranks; a rank that stays silent is a finding."""
    limit_s = max(check.limit_s for check in CHECKS) + GRACE_S
    words = board.hear_all("found", [rank for rank in places if rank != 0], limit_s)
    heard = {0: own, **{rank: [Finding(**word) for word in said] for rank, said in words.items()}}
    silent = [rank for rank in places if rank not in heard]
    if silent:
        heard[0] = [
            *own,
            Finding(
                "reports",
                "fault",
                f"nothing was heard of {names(silent, places)}",
                "see its own output: it died, or hangs",
                group=WORLD,
            ),
        ]
    return heard


def _verdict_of_main(board: Board) -> int:
    """The exit code that rank 0 decides on; 1 where it says nothing."""
    try:
        return int(board.hear("verdict", 0, sum(check.limit_s for check in CHECKS)))
    except TimeoutError:
        return 1


def _report(
    case: Case, heard: dict[int, list[Finding]], places: dict[int, Place], configuration: str | None, started: float
) -> Report:
    rows: list[Row] = sorted(merge(heard, places), key=lambda row: GROUPS.index(row.group))
    folder = os.fspath(case.run_dir)
    return Report(tuple(rows), places, folder, configuration, time.monotonic() - started)
