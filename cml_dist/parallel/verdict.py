"""Who is to blame when a world cannot go on: pure functions of what was heard. No torch, no sockets, no clock."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

START = "its start"
"""Where a rank is until its main thread comes to the meeting: it imports libraries, which can hold Python's lock."""

AGAIN = "run the same command again: training goes on from its last checkpoint"


@dataclass
class Member:
    """A rank, as it last told of itself.

    Attributes:
        rank, host, pid: who it is, for people.
        machine: the kernel and process namespace in which ``pid`` means something.
        where: what its main thread does.
        waiting: whether it waits there for other ranks.
        moved_s: when its main thread got there.
        heard_s: when it last spoke. Both in seconds of this process's monotonic clock.
    """

    rank: int
    host: str
    pid: int
    machine: str
    where: str = START
    waiting: bool = True
    moved_s: float = 0.0
    heard_s: float = 0.0

    @property
    def starts(self) -> bool:
        """It may be silent: if its machine goes, or it dies, the connection tells."""
        return self.where == START

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Verdict:
    """Why the world ends. Travels as JSON.

    Attributes:
        ranks: the culprits.
        what, remedy: the line for people.
        stacks: whether every rank shows what its threads do.
        everywhere: whether every rank is about to find out by itself, and rank 0 to say so.
        stop_code: with which exit code all leave, where a rank did not fail but was asked to stop; None: it failed.
        said: the machine on whose screen the culprit has said it already; empty: none.
        stopped: (machine, pid) of culprits that cannot end by themselves.
    """

    ranks: tuple[int, ...]
    what: str
    remedy: str = AGAIN
    stacks: bool = False
    everywhere: bool = False
    stop_code: int | None = None
    said: str = ""
    stopped: tuple[tuple[str, int], ...] = ()

    @classmethod
    def from_json(cls, data: dict) -> Verdict:
        data["stopped"] = tuple((machine, pid) for machine, pid in data["stopped"])
        return cls(**{**data, "ranks": tuple(data["ranks"])})


def lost(members: Sequence[Member]) -> Verdict:
    """Connections that closed without a goodbye: the kernel closes those of a process that is killed."""
    ended = f"{_who(members)} ended without a word, last seen in {members[0].where} (killed? out of memory?)"
    return Verdict(_ranks(members), ended)


def silent(members: Sequence[Member], now_s: float) -> Verdict:
    """No word for too long, on an open connection."""
    first = members[0]
    what = (
        f"no word from {_who(members)} for {now_s - first.heard_s:.0f} s, last seen in {first.where} "
        "(machine or network down? process stopped, or held up by a call that keeps Python's lock?)"
    )
    return Verdict(_ranks(members), what, stacks=True, stopped=tuple((m.machine, m.pid) for m in members))


def hanging(members: Collection[Member], now_s: float, timeout_s: float) -> Verdict | None:
    """A collective that does not end: the culprits are those that did not come to it, and do not move."""

    def still(member: Member) -> bool:
        return now_s - member.moved_s > timeout_s

    if not any(member.waiting and still(member) for member in members):
        return None  # a rank alone may take its time, while nobody waits for it
    busy = [member for member in members if not member.waiting]
    culprits = [member for member in busy if still(member)]
    if culprits:
        first = culprits[0]
        what = (
            f"{_who(culprits)} did not move for {now_s - first.moved_s:.0f} s in {first.where}, and the others wait; "
            "every rank's log shows its threads"
        )
        return Verdict(_ranks(culprits), what, f"mend it, or raise parallel.timeout_s; then {AGAIN}", stacks=True)
    if busy or not all(still(member) for member in members):
        return None  # someone is at work, and will come
    places: dict[str, list[Member]] = {}
    for member in members:
        places.setdefault(member.where, []).append(member)
    # Where all but a few wait in one place, the few are who went astray.
    by_size = sorted(places.items(), key=lambda place: len(place[1]))
    told = ", ".join(f"{_who(there)} in {where}" for where, there in by_size[:3])
    what = f"all ranks waited for each other for {timeout_s:.0f} s: {told}; every rank's log shows its threads"
    return Verdict(_ranks(by_size[0][1]), what, f"check the network between the machines; then {AGAIN}", stacks=True)


def failed(member: Member, cause: str, everywhere: bool, stop_code: int | None = None) -> Verdict:
    """A rank that said so before it left."""
    what = f"{member.name} {'failed' if stop_code is None else 'left'}: {cause}"
    return Verdict((member.rank,), what, "", everywhere=everywhere, stop_code=stop_code, said=member.machine)


def missing(ranks: Sequence[int], size: int, seconds: float) -> Verdict:
    """Ranks that did not come to the start."""
    some = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return Verdict(
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
