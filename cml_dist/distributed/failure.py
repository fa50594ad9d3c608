"""Who is to blame when a world cannot go on: pure functions of what each rank last said. No torch, no clock."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

AGAIN = "run the same command again: training goes on from its last checkpoint"


@dataclass
class Member:
    """A rank, as it last told of itself. Times count only while the process that measured them ran.

    Attributes:
        rank, host, pid: who it is, for people.
        machine: the kernel and process namespace in which ``pid`` means something.
        where: what its main thread does.
        waiting: whether it waits there for other ranks.
        idle_s: seconds for which its main thread has not moved.
        limit_s: seconds that it may take; grows with the longest pass it has measured.
        broken: whether one of its collectives failed, or its launcher ends it: some other rank may be gone.
        left: whether it has left in peace.
        silent_s: seconds without news of it.
    """

    rank: int
    host: str
    pid: int
    machine: str
    where: str = "its start"
    waiting: bool = False
    idle_s: float = 0.0
    limit_s: float = float("inf")
    broken: bool = False
    left: bool = False
    silent_s: float = 0.0

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def overdue(self) -> bool:
        return self.idle_s > self.limit_s


@dataclass(frozen=True)
class Failure:
    """Why the world ends.

    Attributes:
        ranks: the culprits.
        what, remedy: the line for people.
        stacks: whether every rank shows what its threads do.
        everywhere: whether every rank is about to find out by itself, and rank 0 to say so.
        stop_code: with which exit code all leave, where a rank did not fail but was asked to stop; None: it failed.
        said: the machine on whose screen the culprit has said it already; empty: none.
        gone: whether the culprits are gone, or cannot speak.
        stopped: (machine, pid) of culprits that cannot end by themselves.
    """

    ranks: tuple[int, ...]
    what: str
    remedy: str = AGAIN
    stacks: bool = False
    everywhere: bool = False
    stop_code: int | None = None
    said: str = ""
    gone: bool = False
    stopped: tuple[tuple[str, int], ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        data = json.loads(text)
        stopped = tuple((machine, pid) for machine, pid in data["stopped"])
        return cls(**{**data, "ranks": tuple(data["ranks"]), "stopped": stopped})


def lost(members: Sequence[Member]) -> Failure:
    """Processes that are gone: their kernel, or their connection, says so."""
    ended = f"{_who(members)} ended without a word, last seen in {members[0].where} (killed? out of memory?)"
    return Failure(_ranks(members), ended, gone=True)


def silent(members: Sequence[Member]) -> Failure:
    """No heartbeat for too long."""
    first = members[0]
    what = (
        f"no word from {_who(members)} for {first.silent_s:.0f} s, last seen in {first.where} "
        "(killed? machine or network down? process stopped, or held up by a call that keeps Python's lock?)"
    )
    stopped = tuple((member.machine, member.pid) for member in members)
    return Failure(_ranks(members), what, stacks=True, gone=True, stopped=stopped)


def hanging(members: Collection[Member]) -> Failure | None:
    """A collective that does not end: the culprits are those that did not come to it, and do not move."""
    if not members:
        return None  # all have left
    if len(members) > 1 and not any(member.waiting and member.overdue for member in members):
        return None  # a rank may take its time while nobody waits for it
    busy = [member for member in members if not member.waiting]
    culprits = [member for member in busy if member.overdue]
    if culprits:
        first = culprits[0]
        others = ", and the others wait" if len(members) > 1 else ""
        moved = f"did not move for {first.idle_s:.0f} s in {first.where}{others}"
        what = f"{_who(culprits)} {moved}; the log of each rank shows its threads"
        return Failure(_ranks(culprits), what, f"mend it, or raise parallel.hang_timeout_s; then {AGAIN}", stacks=True)
    if busy or not all(member.overdue for member in members):
        return None  # someone is at work, and will come
    places: dict[str, list[Member]] = {}
    for member in members:
        places.setdefault(member.where, []).append(member)
    # Where all but a few wait in one place, the few are who went astray.
    by_size = sorted(places.items(), key=lambda place: len(place[1]))
    told = ", ".join(f"{_who(there)} in {where}" for where, there in by_size[:3])
    seconds = min(member.idle_s for member in members)
    what = f"all ranks waited for each other for {seconds:.0f} s: {told}; the log of each rank shows its threads"
    return Failure(_ranks(by_size[0][1]), what, f"check the network between the machines; then {AGAIN}", stacks=True)


def failed(member: Member, cause: str, everywhere: bool, stop_code: int | None = None) -> Failure:
    """A rank that said so before it left."""
    what = f"{member.name} {'failed' if stop_code is None else 'left'}: {cause}"
    return Failure((member.rank,), what, "", everywhere=everywhere, stop_code=stop_code, said=member.machine)


def missing(ranks: Sequence[int], size: int, seconds: float) -> Failure:
    """Ranks that did not come to the rendezvous."""
    some = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return Failure(
        tuple(ranks),
        f"{len(ranks)} of {size} processes did not come within {seconds:.0f} s: rank{'s' * (len(ranks) > 1)} {some}",
        "see what they or their machines say, check that this machine can be reached from theirs, or raise "
        "parallel.join_timeout_s",
    )


def _ranks(members: Collection[Member]) -> tuple[int, ...]:
    return tuple(member.rank for member in members)


def _who(members: Sequence[Member]) -> str:
    """One by its full name; several by rank and host."""
    if len(members) == 1:
        return members[0].name
    by_host: dict[str, list[str]] = {}
    for member in members:
        by_host.setdefault(member.host, []).append(str(member.rank))
    return " and ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:8])}{', ...' * (len(ranks) > 8)} (host {host})"
        for host, ranks in by_host.items()
    )
