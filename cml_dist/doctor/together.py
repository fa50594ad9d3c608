"""What takes several processes: who came, joining the world as a run would, the ring, the clocks, the shared folder.

Every step runs on all ranks at once, each with a time limit; rank 0 says what was found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cml_dist.doctor.board import Board
from cml_dist.doctor.check import Case, Hung, failed, in_time
from cml_dist.doctor.findings import Finding, listed, names
from cml_dist.doctor.place import Place
from cml_dist.doctor.storage import parameter_bytes
from cml_dist.errors import CmlError

if TYPE_CHECKING:
    from cml_dist.parallel.world import World

WORLD, STORAGE = "world", "storage"
"""Headings of what is found here."""

JOIN_S, RING_S, SHARED_S = 60.0, 60.0, 90.0
GRACE_S = 15.0
"""What a rank waits for the others beyond their own limits."""

BLAME_S = 5.0
"""What the watch gets to find out who is to blame for a collective that broke."""

REACHABLE = (
    "open the machines' ports to each other (32768 and up: gloo and NCCL connect each pair on one that the kernel "
    "chooses), and name the network: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
)
"""What to do where the ranks met at MASTER_ADDR, but do not reach one another."""


def look_together(
    case: Case, board: Board, places: dict[int, Place], found: list[Finding], begin: Callable[[str], None]
) -> None:
    """The steps that take several processes; adds to ``found`` what rank 0 says of them, and faults of this rank."""
    place = case.place
    absent = [rank for rank in range(place.size) if rank not in places]
    if place.rank == 0 and place.size > 1:
        found += [replace(finding, group=WORLD) for finding in _layout(places, place.size, absent)]
    if absent:  # the world cannot be joined, and a ring with a gap would only be waited for
        return
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
    world.watch.at_end = lambda verdict: case.at_end(verdict.what)
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
        world.watch.await_verdict(BLAME_S)  # where another rank is to blame, it names it, and ends this process
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
