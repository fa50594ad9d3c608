"""The ranks watch each other: who was killed, fell silent, hangs or failed is named, and all end within seconds.

A daemon thread of each rank talks to that of rank 0 (:mod:`cml_dist.parallel.star`), which decides who is to blame
(:mod:`cml_dist.parallel.verdict`); how they meet is in :mod:`cml_dist.parallel.meeting`. The main thread says where it
is (:meth:`Watch.beat`) and where it waits for others, at the cost of an assignment. No torch: a collective that hangs
cannot hold the watch up.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from cml_dist.errors import CmlError, WorldError
from cml_dist.parallel.ending import end_process, guard, is_alive
from cml_dist.parallel.launched import launched_or_alone
from cml_dist.parallel.verdict import AGAIN, START, Member, Verdict

TICK_S = 1.0
"""Seconds between two words of a rank."""

_BROKEN = re.compile(r"gloo|NCCL|ProcessGroup|Connection (closed|reset)|Socket")
"""How collectives word it when the other side has gone."""

BLAME_S = 10.0
"""Seconds in which the watch finds out who broke one."""

GRACE_S = 10.0
"""What a rank has to find out by itself, it finds out within this many seconds."""

MARGIN_S = 15.0
"""Rank 0 names who is missing; the others wait this much longer for it to."""


class Watch:
    """What the main thread sees. This one, where there is no world yet or any more, watches nobody.

    Attributes:
        log: a file for this rank's own copy of what befell the world, and for stacks; None: stacks go to stderr.
        at_end: hears the verdict before the watch ends this process; in the watch's thread, for a few seconds at most.
    """

    def __init__(self) -> None:
        self.log: TextIO | None = None
        self.at_end: Callable[[Verdict], None] = lambda verdict: None
        self._at: tuple[str, bool, float] = (START, False, time.monotonic())

    def beat(self, where: str, may_take_s: float = 0.0) -> None:
        """The main thread is at work in ``where`` (for people: ``step 12, episode 3``).

        Args:
            may_take_s: so much longer than ``parallel.timeout_s``, e.g. what is downloaded.
        """
        self._at = (where, False, time.monotonic() + may_take_s)

    def touch(self) -> None:
        """The main thread gets on with what it is at."""
        self.beat(self._at[0])

    def wait(self, where: str) -> None:
        """The main thread waits in ``where`` for other ranks, until its next beat."""
        self._at = (where, True, time.monotonic())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Round a collective: the main thread waits for other ranks where it is."""
        where = self._at[0]
        self.wait(where)
        try:
            yield
        finally:
            self.beat(where)

    def fail(self, cause: str, *, everywhere: bool = False, stop_code: int | None = None) -> None:
        """Tell the others why this rank is about to leave.

        Args:
            cause: one line.
            everywhere: every rank is about to find out by itself: they get the time to.
            stop_code: it does not fail, but was asked to stop: who does not find out by itself leaves with this code.
        """

    def blame(self, error: BaseException) -> None:
        """Give the watch time to find that another rank is to blame for ``error``: it names it, and ends the process.

        Returns after some seconds where that is not so, and at once when asked again.
        """

    def await_verdict(self, seconds: float) -> None:
        """Give the watch time to end the process, if it is about to."""

    def outlast(self) -> None:
        """At the end of all, rank 0: wait until the others have left, and watch them meanwhile."""

    def close(self) -> None:
        """Leave in peace."""


class Watching(Watch):
    """A watch with a thread: where the main thread is, and for how long.

    Args:
        me: this process.
        timeout_s: seconds after which a main thread that does not move is a failure.
        end: ends this process: ``end(verdict, watch, speaks)``.
    """

    def __init__(self, me: Member, timeout_s: float, end: Callable[[Verdict, Any, bool], None]) -> None:
        super().__init__()
        self.me, self.timeout_s = me, timeout_s
        self._end_process = end
        self._turned_s = self._thawed_s = time.monotonic()

    @property
    def described(self) -> str:
        """This process, and where its main thread is."""
        self._look()
        seconds = max(0.0, time.monotonic() - self.me.moved_s)
        return f"{self.me.name}, {self._doing}in {self.me.where} for {seconds:.0f} s"

    @property
    def _doing(self) -> str:
        return ""

    def _stood_still_s(self, now_s: float) -> float:
        """At each turn of the thread: seconds for which the process as a whole stood still before (a suspended job)."""
        since_s, self._turned_s = now_s - self._turned_s, now_s
        if since_s <= 2 * TICK_S:
            return 0.0
        self._thawed_s = now_s
        return since_s

    def _look(self) -> None:
        """Where the main thread is now. A process that stood still as a whole does not hang."""
        self.me.where, self.me.waiting, moved_s = self._at
        self.me.moved_s = max(moved_s, self._thawed_s)


class Joined(Watching):
    """A rank's watch in a world of several: the part that rank 0 and the others share.

    Args:
        me, timeout_s, end: see :class:`Watching`.
        size: of the world.
        silence_s: seconds without a word after which a rank is lost.
    """

    def __init__(
        self,
        me: Member,
        size: int,
        *,
        silence_s: float,
        timeout_s: float,
        end: Callable[[Verdict, Joined, bool], None] = end_process,
    ) -> None:
        super().__init__(me, timeout_s, end)
        self.size, self.silence_s = size, silence_s
        self.meeting = ""  # a word that no other start of a world has
        self.everyone: list[Member] = []  # by rank
        self._here = threading.Event()  # all came, or will not
        self._error: Verdict | None = None  # ... and this is why not
        self._patience_s = self._until_s = float("inf")  # ... and this is how long they may take
        self._met = threading.Event()  # the main thread has heard of it
        self._telling = threading.Lock()
        self._over = False
        self._blamed: BaseException | None = None
        self._orders: list[tuple[str, Any, threading.Event]] = []  # of the main thread
        self._selector = selectors.PollSelector()  # no kernel object that a forked loader process would share
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._obey)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        os.register_at_fork(after_in_child=self._forked)

    # ------------------------------------------------------------------ for the main thread

    @property
    def _doing(self) -> str:
        return "waiting for others " if self.me.waiting else "at work "

    def start(self) -> None:
        self._thread.start()

    def await_all(self, seconds: float) -> None:
        """Wait until all ranks are here.

        Raises:
            WorldError: some do not come, or one of those that came is lost again.
        """
        self.wait("the meeting of all ranks")
        self._patience_s, self._until_s = seconds, time.monotonic() + seconds
        # Rank 0 may still import: it says who is missing once it has come itself.
        patience_s = max(seconds, self.timeout_s)
        came = self._here.wait(patience_s + MARGIN_S)
        with self._telling:
            self._met.set()
            if self._error is None and not came:
                self._error = Verdict((0,), f"rank 0 does not say within {patience_s:.0f} s that all ranks came", AGAIN)
            why = self._error
        if why is not None:
            error = WorldError(why.what, why.remedy)
            error.everywhere = 0 not in why.ranks
            if why.stop_code is not None:
                error.exit_code = why.stop_code
            raise error

    def fail(self, cause: str, *, everywhere: bool = False, stop_code: int | None = None) -> None:
        self._order("fail", (cause, everywhere, stop_code))

    def blame(self, error: BaseException) -> None:
        if not isinstance(error, CmlError) and error is not self._blamed:
            self._blamed = error
            self.await_verdict(BLAME_S if _BROKEN.search(str(error)) else 1.0)

    def await_verdict(self, seconds: float) -> None:
        self._thread.join(seconds)  # which ends with the process

    def close(self) -> None:
        self._order("leave", None)
        self._thread.join(GRACE_S)

    def _order(self, name: str, detail: Any) -> None:
        done = threading.Event()
        self._orders.append((name, detail, done))
        with suppress(OSError):
            self._wake_out.send(b"!")
        while not done.wait(0.05) and self._thread.is_alive() and self._error is None:
            pass

    def _forked(self) -> None:
        """In a child: a connection that it held open would hide that this rank was killed."""
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            next_s = self._turned_s = time.monotonic()
            while not self._over:
                for key, _ in self._selector.select(max(0.0, next_s - time.monotonic())):
                    if not self._over:
                        key.data()
                if self._over:
                    break
                now_s = time.monotonic()
                stood_still_s = self._stood_still_s(now_s)
                if stood_still_s:  # the others' words wait to be read
                    self._excuse(stood_still_s)
                if now_s >= next_s:
                    next_s = now_s + TICK_S
                    self._tick(now_s)
                due_s = self._due_s()
                if due_s is not None:
                    next_s = min(next_s, due_s)
        except Exception:  # of ours: a world that nobody watches is worse than one that ends
            self._end(Verdict((self.me.rank,), f"the watch of {self.me.name} failed: {traceback.format_exc()}"))
        finally:
            if self._over:
                self._shut()

    def _state(self, now_s: float) -> dict[str, Any]:
        self._look()
        return {"where": self.me.where, "waiting": self.me.waiting, "idle_s": round(now_s - self.me.moved_s, 3)}

    def _obey(self) -> None:
        with suppress(BlockingIOError):
            self._wake_in.recv(2**10)
        while self._orders:
            name, detail, done = self._orders.pop(0)
            if name == "fail":
                self._tell_failure(*detail)
            else:
                self._say_goodbye()
            self._over = True
            done.set()

    def _end(self, verdict: Verdict) -> None:
        """The world is lost: at the meeting the main thread hears of it, afterwards the process ends."""
        with self._telling:
            self._error = verdict  # the main thread no longer waits for this one
            met = self._met.is_set()
        self._here.set()
        if not met:
            # It is on its way to the meeting. What it will find out by itself, it gets any time to: an import may take
            # minutes, and a process that a scheduler stops does not fail.
            met_late = self._met.wait(self.timeout_s if verdict.everywhere else GRACE_S)
            if met_late:
                self._over = True
                return
        speaks = self._speaks(verdict)
        if met and verdict.everywhere:
            time.sleep(GRACE_S)  # the main thread ends the process before that
            speaks = self.me.rank == 0
        self._over = True
        self._end_process(verdict, self, speaks)

    def _speaks(self, verdict: Verdict) -> bool:
        """Whether this rank is the one that puts the line on the screen."""
        if 0 not in verdict.ranks or verdict.said:
            # Who failed has said so, on its machine's screen.
            return self.me.rank == 0 and verdict.said != self.me.machine
        if not self.everyone:  # not all came: the first of each machine
            return launched_or_alone().local_rank == 0
        leader = self.everyone[0]
        if self.me.machine == leader.machine:
            return not any(is_alive(m) for m in self.everyone[1 : self.me.rank] if m.machine == leader.machine)
        # Its machine may be lost with all its ranks: then nobody there speaks.
        return self.me.rank == next(m.rank for m in self.everyone if m.machine != leader.machine)

    def _shut(self) -> None:
        guard(None, 0, False)
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
        self._wake_in.close()
        self._wake_out.close()

    def _guard(self) -> None:
        """Should this thread not run again for lack of Python's lock, faulthandler's own shows who holds it."""
        if not self._met.is_set():
            return  # an import does
        alone = sum(member.machine == self.me.machine for member in self.everyone) == 1
        # Who is not alone on its machine is ended by the others there.
        guard(self.log, 2 * self.timeout_s if alone else 0.8 * self.silence_s, alone)

    # ------------------------------------------------------------------ what rank 0 and the others do differently

    def _tick(self, now_s: float) -> None:
        raise NotImplementedError

    def _due_s(self) -> float | None:
        """When there is something to decide before the next tick."""
        return None

    def _excuse(self, seconds: float) -> None:
        """This process stood still: nobody was silent meanwhile."""
        raise NotImplementedError

    def _tell_failure(self, cause: str, everywhere: bool, stop_code: int | None) -> None:
        raise NotImplementedError

    def _say_goodbye(self) -> None:
        raise NotImplementedError


_this: Watch = Watch()


def this_watch() -> Watch:
    """This process's watch, wherever its world was joined."""
    return _this


def keep_watch(watch: Watch) -> None:
    """Make ``watch`` this process's."""
    global _this
    _this = watch
