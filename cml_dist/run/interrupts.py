"""Signals that ask a run to stop: the running meta-step ends, then the run saves and leaves."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from cml_dist.distributed.env import LAUNCHED_LOCALLY, launched_or_alone

STOPPED_BY_USER = 130
"""Exit code of a run that Ctrl-C stopped and that saved: the shell's own for Ctrl-C."""

STOPPED_BY_SCHEDULER = 75
"""Exit code of a run that another signal stopped and that saved (EX_TEMPFAIL: the same command goes on)."""


class Stopped(BaseException):
    """The run was asked to stop; raised by all ranks at the same place, once nothing can be lost.

    No Exception: what handles faults must let it pass.
    """


class Interrupts:
    """While open, SIGINT and ``signals`` only set ``stop``; after :meth:`raise_signals` they end the run at once.

    Further signals change nothing. Only a second Ctrl-C without a launcher interrupts at once.

    Attributes:
        stop: name of the first signal that came; None.
        cut_short: whether it came while signals end the run at once: whatever is raised then may come of it.
    """

    def __init__(self, signals: Sequence[str] = ("SIGUSR1", "SIGTERM")) -> None:
        self.stop: str | None = None
        self._deferred, self._signals = True, ("SIGINT", *signals)
        # Under a launcher one Ctrl-C arrives twice, from the terminal and from the launcher.
        self._launched = "LOCAL_RANK" in os.environ
        self._previous: dict[int, Any] = {}

    @property
    def cut_short(self) -> bool:
        return self.stop is not None and not self._deferred

    def raise_signals(self) -> None:
        """From now on a signal raises Stopped or KeyboardInterrupt at once, also one that came before."""
        self._deferred = False
        if self.stop is not None:
            raise KeyboardInterrupt if self.stop == "SIGINT" else Stopped

    def defer_signals(self) -> None:
        """From now on signals only set ``stop``, which the run reads between meta-steps and tested episodes."""
        self._deferred = True

    def ignore_signals(self) -> None:
        """When a stopped run exits: the interpreter drops its handlers, and a repeated signal would kill it."""
        if self.stop is not None:
            for number in self._previous:
                signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for name in self._signals:
                number = signal.Signals[name]
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop is None:
            self.stop = signal.Signals(number).name
            if not self._deferred:
                self.raise_signals()
            elif number == signal.SIGINT and launched_or_alone().rank == 0 and LAUNCHED_LOCALLY not in os.environ:
                # Past Python's buffers, in which this handler may have come down.
                with suppress(OSError):  # nobody may read it any more
                    os.write(2, b"\nCtrl-C: the run stops and saves once its meta-step or episode is done\n")
        elif number == signal.SIGINT and not self._launched:
            raise KeyboardInterrupt
