"""Where the main thread of this process is, and the heartbeat that tells the other ranks. No torch here.

The main thread only assigns where it is; :mod:`cml_dist.distributed.rank_heartbeat` has the threads that tell and
judge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from cml_dist.distributed.failure import Failure


class Heartbeat:
    """What the main thread sees. This one, where there is no world yet or any more, does nothing.

    Attributes:
        log: a file for this rank's own copy of what befell the world, and for stacks; None: stacks go to stderr.
        at_end: hears of the failure before this process ends; in a thread, for a few seconds at most.
        met: whether all ranks have met.
        machine: see :class:`cml_dist.distributed.failure.Member`.
        described: this rank, and where its main thread is.
        connected_before: both ends of each TCP connection that this process had before the ranks met.
    """

    met, machine, described = False, "", ""
    connected_before: Collection[tuple[Any, Any] | None] = ()

    def __init__(self) -> None:
        self.log: TextIO | None = None
        self.at_end: Callable[[Failure], None] = lambda failure: None
        # (where, waiting for others, a number that grows with each move, seconds that this may take besides)
        self._at: tuple[str, bool, int, float] = ("its start", False, 0, 0.0)

    def beat(self, where: str, may_take_s: float = 0.0) -> None:
        """The main thread is at work in ``where`` (for people: ``step 12, episode 3``).

        Args:
            may_take_s: so much longer than ``parallel.hang_timeout_s``, e.g. what is downloaded.
        """
        self._at = (where, False, self._at[2] + 1, may_take_s)

    def touch(self) -> None:
        """The main thread gets on with what it is at."""
        where, _, moves, may_take_s = self._at
        self._at = (where, False, moves + 1, may_take_s)

    def wait(self, where: str) -> None:
        """The main thread waits in ``where`` for other ranks, until its next beat."""
        self._at = (where, True, self._at[2] + 1, 0.0)

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
        """Wait until the judge has found that another rank is to blame for ``error``, and ends this process.

        Returns after some seconds where that is not so, and at once when asked again.
        """

    def await_failure(self, seconds: float) -> None:
        """Some rank may be gone: give the judge time to name it and to end this process."""

    def outlast(self) -> None:
        """At the end of all, rank 0: wait until the others have left, and judge them meanwhile."""

    def close(self) -> None:
        """Leave in peace."""


_this: Heartbeat = Heartbeat()


def this_heartbeat() -> Heartbeat:
    """This process's heartbeat."""
    return _this


def set_heartbeat(heartbeat: Heartbeat) -> None:
    """Make ``heartbeat`` this process's."""
    global _this
    _this = heartbeat
