"""Ctrl-C and SIGTERM: the running meta-step ends, then the run saves and leaves."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While open, SIGINT and SIGTERM only set ``stop``; without a launcher a second SIGINT interrupts at once.

    A checkpoint is a rename, so also an interrupted one leaves the last checkpoint whole.
    """

    def __init__(self) -> None:
        self.stop = False
        # Under a launcher one Ctrl-C comes twice, from the terminal and from the launcher: it is no sign of impatience.
        self._launched = "LOCAL_RANK" in os.environ
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop and number == signal.SIGINT and not self._launched:
            raise KeyboardInterrupt
        self.stop = True
