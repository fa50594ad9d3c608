"""Signals that ask a run to stop: the running meta-step ends, then the run saves and leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

STOPPED_BY_USER = 130
"""Exit code of a run that Ctrl-C stopped and that saved: the shell's own for Ctrl-C."""

STOPPED_BY_SCHEDULER = 75
"""Exit code of a run that another signal stopped and that saved (EX_TEMPFAIL: the same command goes on)."""


class Stopped(BaseException):
    """The run was asked to stop; raised by all ranks at the same place, once nothing can be lost.

    No Exception: what handles faults must let it pass.
    """


class Interrupts:
    """While open, SIGINT and ``signals`` end the run at once; once it is :meth:`patient`, they only set ``stop``.

    A second signal changes nothing, however many come: the run is on its way out. Only SIGINT without a launcher, from
    someone at the keyboard, interrupts at once then. A checkpoint is a rename: it is whole or not there also then.

    Args:
        signals: names, e.g. ``SIGUSR1``.

    Attributes:
        stop: name of the first signal that came; None.
    """

    def __init__(self, signals: Sequence[str] = ("SIGUSR1", "SIGTERM")) -> None:
        self.stop: str | None = None
        self._signals = ("SIGINT", *signals)
        self._came_s: float | None = None
        self._patient = False
        # Under a launcher one Ctrl-C comes twice, from the terminal and from the launcher: it is no sign of impatience.
        self._launched = "LOCAL_RANK" in os.environ
        self._previous: dict[int, Any] = {}

    @property
    def seconds(self) -> float:
        """Since the signal came (0 where it came to another rank alone)."""
        return 0.0 if self._came_s is None else time.monotonic() - self._came_s

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait meanwhile: in the middle of an import Stopped may be swallowed, and leave half a module."""
        self._patient = True
        yield
        self._patient = False
        if self.stop is not None:
            raise KeyboardInterrupt if self.stop == "SIGINT" else Stopped

    @property
    def cut_short(self) -> bool:
        """Whether a signal came while there was nothing to lose: whatever is raised then may come of it."""
        return self.stop is not None and not self._patient

    def deafen(self) -> None:
        """On the way out of a stopped run: the interpreter drops its handlers, and a repeated signal would kill it."""
        if self.stop is not None:
            for number in self._previous:
                signal.signal(number, signal.SIG_IGN)

    def patient(self) -> None:
        """From now on there is something to lose: signals wait until the run asks."""
        self._patient = True

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for name in self._signals:
                number = signal.Signals[name]
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            if number == signal.SIGINT and not self._launched:
                raise KeyboardInterrupt
            return
        self.stop, self._came_s = signal.Signals(number).name, time.monotonic()
        if not self._patient:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped
