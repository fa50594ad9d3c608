"""The watch's messages: rank 0's part, which hears all and decides, and that of the others."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from cml_dist.parallel import verdict as verdicts
from cml_dist.parallel.verdict import Member, Verdict
from cml_dist.parallel.watch import TICK_S, Joined
from cml_dist.parallel.wire import Wire, encoded

TOGETHER_S = 0.5
"""The ranks of a machine die one after the other: seconds in which the rest of them is noticed."""

CUT_S = 5.0
"""The kernel cuts a connection to a machine that is gone so long after the watch has said so, which says more."""

STRANGER_S = 5.0
"""Seconds in which a new connection must say who it is."""


class Leader(Joined):
    """Rank 0's: hears all, decides, and tells all.

    Args:
        server: a listening socket.
        tokens: either is shown by a rank to be let in: a secret of this start of the world, and the world's word.
        countersign: what rank 0 shows, beside the word.
    """

    def __init__(
        self,
        me: Member,
        size: int,
        server: socket.socket,
        tokens: tuple[str, str],
        countersign: str,
        **rest: Any,
    ) -> None:
        super().__init__(me, size, **rest)
        server.setblocking(False)
        self._server, self._tokens, self._countersign = server, tokens, countersign
        self.meeting = countersign
        self._members: dict[int, Member] = {}
        self._wires: dict[int, Wire] = {}
        self._strangers: dict[Wire, float] = {}
        self._guests: set[Wire] = set()
        self._gone: set[int] = set()
        self._lost: list[Member] = []
        self._decide_s: float | None = None
        self._last = threading.Event()  # the others have left in peace
        self._selector.register(server, selectors.EVENT_READ, self._accept)

    def outlast(self) -> None:
        self.wait("the end of the others")
        while not self._last.wait(TICK_S) and self._thread.is_alive():
            pass

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._server.accept()
            wire = Wire(connection, 2**16, self.silence_s + CUT_S)
            if len(self._strangers) + len(self._guests) > 3 * self.size + 64:
                wire.close()
                return
            self._strangers[wire] = time.monotonic() + STRANGER_S
            self._selector.register(wire, selectors.EVENT_READ, lambda: self._hear_stranger(wire))

    def _hear_stranger(self, wire: Wire) -> None:
        """Welcome who knows a token; drop whatever else knocks."""
        try:
            messages = wire.read()
            if messages:
                hello = messages[0]
                known = hello.pop("token", "") in self._tokens
                if known and not self._refused(wire, hello["member"]["rank"], hello["size"]):
                    self._welcome(wire, Member(**hello["member"]))
                    return
            elif wire.open:
                return
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        self._drop(wire)

    def _refused(self, wire: Wire, rank: int, size: int) -> bool:
        why = None
        if size != self.size:
            why = f"rank {rank} was started for a world of {size}, and rank 0 for one of {self.size}"
        elif not 0 < rank < self.size:
            why = f"a process calls itself rank {rank} in a world of {self.size}"
        elif rank in self._members:
            why = f"two processes call themselves rank {rank}, one of them on host {self._members[rank].host}"
        elif rank in self._gone:  # a launcher may start it again before this process has ended
            why = f"rank {rank} has left this start of the world"
        if why is not None:
            wire.write({"refused": why})
        return why is not None

    def _welcome(self, wire: Wire, member: Member) -> None:
        """It comes in by itself: by now it may have gone to knock once more, since this process was held up."""
        del self._strangers[wire]
        self._guests.add(wire)
        self._selector.modify(wire, selectors.EVENT_READ, lambda: self._hear_guest(wire, member))
        wire.write({"welcome": self._countersign, "word": self._tokens[1], "leader": asdict(self.me)})

    def _hear_guest(self, wire: Wire, member: Member) -> None:
        with suppress(ValueError, RecursionError):
            if messages := wire.read():
                if not self._refused(wire, member.rank, self.size):
                    wire.keep(messages[1:])
                    self._let_in(wire, member)
                    self._hear(member.rank)
                    return
            elif wire.open:
                return
        self._drop(wire)

    def _drop(self, wire: Wire) -> None:
        self._strangers.pop(wire, None)
        self._guests.discard(wire)
        self._selector.unregister(wire)
        wire.close()

    def _let_in(self, wire: Wire, member: Member) -> None:
        self._guests.discard(wire)
        member.moved_s = member.heard_s = time.monotonic()
        self._members[member.rank], self._wires[member.rank] = member, wire
        self._selector.modify(wire, selectors.EVENT_READ, lambda: self._hear(member.rank))
        if len(self._members) == self.size - 1:
            self._all_here()

    def _all_here(self) -> None:
        self.everyone = sorted([self.me, *self._members.values()], key=lambda member: member.rank)
        self._tell({"go": self.meeting, "everyone": [asdict(member) for member in self.everyone]})
        self._here.set()

    def _hear(self, rank: int) -> None:
        member, wire = self._members[rank], self._wires[rank]
        try:
            messages = wire.read()
        except (ValueError, RecursionError):
            messages, wire.open = [], False
        now_s = time.monotonic()
        for message in messages:
            member.heard_s = now_s
            if "where" in message:
                member.where, member.waiting = message["where"], message["waiting"]
                member.moved_s = now_s - message["idle_s"]
            elif "failed" in message:
                self._remove(rank)
                self._decide(verdicts.failed(member, message["failed"], message["everywhere"], message["stop_code"]))
                return
            elif "bye" in message:
                self._remove(rank)
                if not self._members:
                    self._last.set()
                return
        if not wire.open:
            self._remove(rank)
            self._lost.append(member)
            if self._decide_s is None:
                self._decide_s = now_s + TOGETHER_S

    def _remove(self, rank: int) -> None:
        del self._members[rank]
        self._gone.add(rank)
        wire = self._wires.pop(rank)
        self._selector.unregister(wire)
        wire.close()

    def _tell(self, message: dict[str, Any]) -> None:
        line = encoded(message)  # once: who came is as long as the world
        for wire in list(self._wires.values()):
            wire.send(line)

    def _decide(self, verdict: Verdict) -> None:
        self._tell({"verdict": asdict(verdict)})
        until_s = time.monotonic() + 2.0
        for rank, wire in self._wires.items():
            if rank not in verdict.ranks:
                wire.flush(until_s - time.monotonic())
        self._end(verdict)

    def _due_s(self) -> float | None:
        return self._decide_s

    def _tick(self, now_s: float) -> None:
        for wire, until_s in list(self._strangers.items()):
            if now_s > until_s:
                self._drop(wire)
        if self._decide_s is not None:
            if now_s >= self._decide_s:
                self._decide(verdicts.lost(self._lost))
            return
        silent = [m for m in self._members.values() if now_s - m.heard_s > self.silence_s and not m.starts]
        if silent:  # of a machine that went down, the others too are about to be
            about_s = self.silence_s - 2 * TICK_S
            silent = [m for m in self._members.values() if now_s - m.heard_s > about_s and not m.starts]
            self._decide(verdicts.silent(silent, now_s))
            return
        if not self._here.is_set():
            if now_s > self._until_s:
                absent = sorted(set(range(1, self.size)) - set(self._members))
                self._decide(verdicts.missing(absent, self.size, self._patience_s))
                return
            self._tell(self._state(now_s))  # who is here already must not take rank 0 for lost
            return
        self._look()
        verdict = verdicts.hanging([self.me, *self._members.values()], now_s, self.timeout_s)
        if verdict is not None:
            self._decide(verdict)
            return
        self._tell(self._state(now_s))
        self._guard()

    def _excuse(self, seconds: float) -> None:
        for member in self._members.values():
            member.heard_s += seconds

    def _tell_failure(self, cause: str, everywhere: bool, stop_code: int | None) -> None:
        self._look()
        verdict = verdicts.failed(self.me, cause, everywhere, stop_code)
        self._tell({"verdict": asdict(verdict)})
        for wire in self._wires.values():
            wire.flush(0.5)

    def _say_goodbye(self) -> None:
        self._tell({"bye": True})
        for wire in self._wires.values():
            wire.flush(0.5)

    def _shut(self) -> None:
        super()._shut()
        for wire in [*self._wires.values(), *self._strangers, *self._guests]:
            wire.close()
        self._server.close()


class Follower(Joined):
    """Any other rank's: tells rank 0 of itself, and hears of the others from it.

    Args:
        leader: rank 0.
        wire: the connection to it, which has let this rank in.
    """

    def __init__(self, me: Member, size: int, leader: Member, wire: Wire, **rest: Any) -> None:
        super().__init__(me, size, **rest)
        self._leader, self._wire = leader, wire
        self._told = False  # rank 0 lives, and speaks
        leader.heard_s = time.monotonic()
        self._selector.register(wire, selectors.EVENT_READ, self._hear)

    def _hear(self) -> None:
        try:
            messages = self._wire.read()
        except (ValueError, RecursionError):
            messages, self._wire.open = [], False
        for message in messages:
            self._leader.heard_s = time.monotonic()
            if "where" in message:
                self._leader.where = message["where"]
            elif "go" in message:
                self.meeting = message["go"]
                self.everyone = [Member(**member) for member in message["everyone"]]
                self._here.set()
            elif "refused" in message:
                self._end(Verdict((self.me.rank,), message["refused"], ""))
                return
            elif "verdict" in message:
                self._told = True
                self._end(Verdict.from_json(message["verdict"]))
                return
            elif "bye" in message:  # only at the end of everything
                self._over = True
                return
        if not self._wire.open:
            self._end(verdicts.lost([self._leader]))

    def _speaks(self, verdict: Verdict) -> bool:
        return not self._told and super()._speaks(verdict)

    def _tick(self, now_s: float) -> None:
        self._hear()  # also what came with the welcome, of which the kernel says nothing any more
        if self._over:
            return
        # Nobody else could tell that rank 0 does not get out of its imports: it may be stopped there.
        patience_s = max(self.timeout_s, self.silence_s) if self._leader.starts else self.silence_s
        if now_s - self._leader.heard_s > patience_s:
            self._end(verdicts.silent([self._leader], now_s))
            return
        self._wire.write(self._state(now_s))
        if self._here.is_set():
            self._guard()

    def _excuse(self, seconds: float) -> None:
        self._leader.heard_s += seconds

    def _tell_failure(self, cause: str, everywhere: bool, stop_code: int | None) -> None:
        self._wire.write({"failed": cause, "everywhere": everywhere, "stop_code": stop_code})
        self._wire.flush(2.0)

    def _say_goodbye(self) -> None:
        self._wire.write({"bye": True})
        self._wire.flush(2.0)

    def _shut(self) -> None:
        super()._shut()
        self._wire.close()
