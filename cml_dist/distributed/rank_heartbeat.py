"""The heartbeat: each rank says once a second where it is; who is killed, hangs or fails is named, and all end.

The main thread only assigns where it is. One daemon thread exchanges words over a client of torch's ``TCPStore`` of its
own; another judges (:mod:`cml_dist.distributed.failure`), so that a network that swallows words cannot hold it up. Rank
0 judges all ranks, the others rank 0; the processes of one machine also look whether the others there still exist.
Silence and standstill count only time in which the process that judges ran itself: a suspended job goes on.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
from torch.distributed import DistNetworkError, DistStoreError, Store

from cml_dist.distributed import failure as failures
from cml_dist.distributed.exit import end_process, show_stack_unless_called_again
from cml_dist.distributed.failure import Failure, Member
from cml_dist.distributed.heartbeat import Heartbeat, set_heartbeat
from cml_dist.errors import CmlError

SUSPECT_S = 4.0
"""Silence after which a rank is lost, once a collective has broken or a launcher ends its ranks: one is gone."""

BLAME_S = 10.0
"""Seconds that the judge gets to find who broke a collective."""

GRACE_S = 10.0
"""What a rank has to find out by itself, it finds out within this many seconds."""

TELL_S = 5.0
"""Rank 0 serves the store: it stays this long for the others to read why they end."""

LIMIT_GROWTH = 3.0
"""A rank may take this many times as long as its longest pass so far, e.g. one that compiled."""

_BROKEN = re.compile(r"gloo|NCCL|ProcessGroup|Connection (closed|reset)|Socket")
"""How collectives word it when the other side has gone."""


class RankHeartbeat(Heartbeat):
    """The heartbeat of a rank; of a process that is alone in its world where there is no store.

    Args:
        me: this rank.
        everyone: all ranks, in order; ``me`` is one of them.
        store: a client of its own to the store that rank 0 serves; None: this process is alone.
        heartbeat_timeout_s: seconds without news after which a rank is lost.
        hang_timeout_s: seconds after which a main thread that does not move is a failure.
        tick_s: seconds between two beats.
        end: ends this process: ``end(failure, heartbeat, speaks)``.

    Attributes:
        served: at rank 0 the store itself, which lives as long as this and not only as long as the process group.
    """

    def __init__(
        self,
        me: Member,
        everyone: Sequence[Member],
        store: Store | None,
        *,
        heartbeat_timeout_s: float,
        hang_timeout_s: float,
        tick_s: float = 1.0,
        end: Callable[[Failure, RankHeartbeat, bool], None] = end_process,
    ) -> None:
        super().__init__()
        self.me, self.everyone, self._store = me, list(everyone), store
        self.served: Store | None = None
        self.met, self.machine = store is not None, me.machine
        self.heartbeat_timeout_s, self.hang_timeout_s = heartbeat_timeout_s, hang_timeout_s
        self.tick_s, self._end_process = tick_s, end
        others = [member for member in self.everyone if member is not me]
        self._neighbours = [member for member in others if member.machine == me.machine]
        self._judged = others if me.rank == 0 else self.everyone[:1]  # whose silence this rank judges
        self._heard = [m for m in others if m in self._judged or m in self._neighbours]  # whose words it reads
        self._counts: dict[int, int] = {}
        self._beats, self._longest_s, self._moves_seen = 0, 0.0, -1
        self._found: Failure | None = None  # by this rank, to be told
        self._failure: Failure | None = None  # the world's
        self._told = threading.Event()  # those who read it have
        self._farewell = threading.Event()  # this rank's last word is with the store
        self._wake, self._over = threading.Event(), threading.Event()
        self._blamed: BaseException | None = None
        self._store_lost = False
        self._dead: list[Member] = []
        self._judge_thread = threading.Thread(target=self._judge, name="heartbeat-judge", daemon=True)
        self._talk_thread = threading.Thread(target=self._talk, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._judge_thread.start()
        if self._store is not None:
            self._talk_thread.start()

    @property
    def described(self) -> str:  # type: ignore[override]
        doing = "waiting for others " if self.me.waiting else "at work "
        return f"{self.me.name}, {doing if self.met else ''}in {self.me.where} for {self.me.idle_s:.0f} s"

    # ------------------------------------------------------------------ for the main thread

    def fail(self, cause: str, *, everywhere: bool = False, stop_code: int | None = None) -> None:
        self._over.set()  # this rank ends by itself
        self._publish(failures.failed(self.me, cause, everywhere, stop_code))

    def blame(self, error: BaseException) -> None:
        if not isinstance(error, CmlError) and error is not self._blamed:
            self._blamed = error
            if _BROKEN.search(str(error)):
                self.await_failure(BLAME_S)
            else:
                self._judge_thread.join(1.0)  # another rank may have said that it failed

    def await_failure(self, seconds: float) -> None:
        self.me.broken = self.met
        self._judge_thread.join(seconds)  # which ends with the process

    def outlast(self) -> None:
        if self.met and self.me.rank == 0:
            self.wait("the end of the other ranks")
            while not all(member.left for member in self._heard):
                time.sleep(0.05)
                self._wake.set()

    def close(self) -> None:
        self._over.set()
        self.me.left = True
        if self.met:
            self._wake.set()
            self._farewell.wait(GRACE_S)

    # ------------------------------------------------------------------ the judge's thread

    def _judge(self) -> None:
        turned_s = time.monotonic()
        while not self._over.wait(self.tick_s):
            now_s = time.monotonic()
            ran_s, turned_s = min(now_s - turned_s, 2 * self.tick_s), now_s
            self._count(ran_s)
            failure = self._failure or self._find()
            if failure is not None and not self._over.is_set():
                self._end(failure)
                return
            # Should this thread not run again for lack of Python's lock, the main thread, which may have it, is shown.
            held_s = 0.8 * self.heartbeat_timeout_s if self.met else 2 * self.hang_timeout_s
            show_stack_unless_called_again(self.log, held_s)
        show_stack_unless_called_again(self.log, 0)

    def _count(self, ran_s: float) -> None:
        """The time that passed while this process ran."""
        me, (where, waiting, moves, may_take_s) = self.me, self._at
        if moves != self._moves_seen:
            if not me.waiting:
                self._longest_s = max(self._longest_s, me.idle_s)
            self._moves_seen, me.idle_s = moves, 0.0
        else:
            me.idle_s += ran_s
        me.where, me.waiting = where, waiting
        me.limit_s = max(self.hang_timeout_s, LIMIT_GROWTH * self._longest_s) + may_take_s
        for member in self._heard:
            member.silent_s += ran_s

    def _find(self) -> Failure | None:
        """What this rank can tell by itself."""
        if self._store_lost:
            return failures.lost(self.everyone[:1])
        if self._dead:
            return failures.lost(self._dead)
        broken = self.me.broken or any(member.broken for member in self._heard)
        limit_s = min(SUSPECT_S, self.heartbeat_timeout_s) if broken else self.heartbeat_timeout_s
        silent = [member for member in self._judged if not member.left and member.silent_s > limit_s]
        if silent:
            return failures.silent(silent)
        return failures.hanging([m for m in self.everyone if not m.left]) if self.me.rank == 0 else None

    def _end(self, found: Failure) -> None:
        failure = self._publish(found)
        speaks = self._speaks(failure)
        if failure.everywhere:
            until_s = time.monotonic() + GRACE_S  # the main thread ends the process before that, or waits for this one
            while time.monotonic() < until_s and not self.me.broken:
                time.sleep(0.1)
            speaks = self.me.rank == 0
        show_stack_unless_called_again(self.log, 0)
        self._end_process(failure, self, speaks)

    def _publish(self, found: Failure) -> Failure:
        """Tell the others; the first who does is believed.

        Returns:
            The world's failure, by whomever it was found.
        """
        if self._store is None or self._store_lost:
            return found
        self._found = self._found or found
        self._wake.set()
        self._told.wait(TELL_S)
        return self._failure or found

    def _speaks(self, failure: Failure) -> bool:
        """Whether this rank is the one that puts the line on the screen."""
        if 0 not in failure.ranks or not failure.gone:
            return self.me.rank == 0 and failure.said != self.me.machine
        leader = self.everyone[0]
        if self.me.machine == leader.machine:
            return not any(_is_alive(member) for member in self._neighbours if 0 < member.rank < self.me.rank)
        # Rank 0's machine may be lost with all its ranks: the first rank elsewhere speaks too.
        return self.me.rank == next(m.rank for m in self.everyone if m.machine != leader.machine)

    # ------------------------------------------------------------------ the thread that talks

    def _talk(self) -> None:
        try:
            while not self._farewell.is_set():
                self._wake.wait(self.tick_s)
                self._wake.clear()
                try:
                    self._exchange(self._store)
                except DistStoreError:
                    pass  # timed out: the judge counts the silence
        except DistNetworkError:
            self._store_lost = not self._over.is_set()
        finally:
            self._told.set()
            self._farewell.set()

    def _exchange(self, store: Store) -> None:
        me = self.me
        dead = [member for member in self._neighbours if not _is_alive(member)]
        self._beats += 1
        leaves = me.left
        facts = (self._beats, me.where, me.waiting, round(me.idle_s, 1), round(me.limit_s, 1), me.broken, leaves)
        store.set(f"beat/{me.rank}", json.dumps(facts))
        if self._failure is None:
            self._read_failure(store)
        if self._heard:
            words = store.multi_get([f"beat/{member.rank}" for member in self._heard])
            for member, word in zip(self._heard, words, strict=True):
                self._hear(member, json.loads(word))
        self._dead = [member for member in dead if not member.left]
        if leaves:
            self._farewell.set()

    def _hear(self, member: Member, facts: list) -> None:
        count, member.where, member.waiting, member.idle_s, member.limit_s, member.broken, member.left = facts
        if count != self._counts.get(member.rank):
            self._counts[member.rank] = count
            member.silent_s = 0.0

    def _read_failure(self, store: Store) -> None:
        """What ended the world, if anything did; rank 0 stays until the others have read it."""
        if self._found is not None:
            word = store.compare_set("failure", "", self._found.to_json())
        elif store.check(["failure"]):
            word = store.get("failure")
        else:
            return
        failure = Failure.from_json(word)
        store.set(f"read/{self.me.rank}", "yes")
        self._failure = failure
        if self.me.rank == 0:
            lost = failure.ranks if failure.gone else ()  # who hangs can still read
            self._await_readers(store, [m for m in self._heard if m.rank not in lost and not m.left])
        self._told.set()

    def _await_readers(self, store: Store, readers: list[Member]) -> None:
        until_s = time.monotonic() + TELL_S
        while readers and time.monotonic() < until_s:
            time.sleep(0.05)
            readers = [m for m in readers if not store.check([f"read/{m.rank}"])]
            readers = [m for m in readers if m.machine != self.me.machine or _is_alive(m)]


def _is_alive(member: Member) -> bool:
    """Whether a process of this machine runs: it exists, and is no zombie."""
    try:
        return psutil.Process(member.pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def heartbeat_alone(me: Member, hang_timeout_s: float) -> Iterator[None]:
    """Meanwhile a process that is its whole world ends itself where it hangs; afterwards it may take any time."""
    heartbeat = RankHeartbeat(me, [me], None, heartbeat_timeout_s=hang_timeout_s, hang_timeout_s=hang_timeout_s)
    heartbeat.start()
    set_heartbeat(heartbeat)
    try:
        yield
    finally:
        heartbeat.close()
        set_heartbeat(Heartbeat())
