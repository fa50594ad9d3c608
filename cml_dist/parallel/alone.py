"""The watch of a process that is its whole world: if it hangs, nobody else would ever notice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cml_dist.parallel.arrival import identity
from cml_dist.parallel.ending import end_process, guard
from cml_dist.parallel.verdict import AGAIN, Member, Verdict
from cml_dist.parallel.watch import TICK_S, Watch, Watching, keep_watch


class Alone(Watching):
    """Ends this process, with the stacks of its threads, once its main thread has not moved for too long.

    Args:
        timeout_s: for how long.
        end: ends this process: ``end(verdict, watch, speaks)``.
    """

    def __init__(self, timeout_s: float, end: Callable[[Verdict, Alone, bool], None] = end_process) -> None:
        super().__init__(identity(0), timeout_s, end)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._over.wait(TICK_S):
                now_s = time.monotonic()
                self._stood_still_s(now_s)
                self._look()
                if now_s - self.me.moved_s > self.timeout_s:
                    self._end_process(hanging(self.me, now_s, in_log=self.log is not None), self, True)
                    return
                # Should this thread not run again for lack of Python's lock, faulthandler's own shows who holds it.
                # It may not end the process: its timer counts the time of a suspended job too.
                guard(self.log, 2 * self.timeout_s, False)
        finally:
            guard(None, 0, False)


def hanging(me: Member, now_s: float, *, in_log: bool) -> Verdict:
    """As of a rank that lets others wait (:func:`cml_dist.parallel.verdict.hanging`)."""
    shown = "its log shows its threads" if in_log else "its threads are shown below"
    what = f"{me.name} did not move for {now_s - me.moved_s:.0f} s in {me.where}; {shown}"
    return Verdict((0,), what, f"mend it, or raise parallel.timeout_s; then {AGAIN}", stacks=True)


@contextmanager
def watched_alone(timeout_s: float) -> Iterator[None]:
    """Meanwhile this process is watched, whatever becomes of it; afterwards it may take any time."""
    watch = Alone(timeout_s)
    keep_watch(watch)
    try:
        yield
    finally:
        watch.close()
        keep_watch(Watch())
