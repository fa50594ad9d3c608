"""Ctrl-C and SIGTERM: the running meta-step ends, then the run saves and leaves."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """While open, the first SIGINT or SIGTERM only sets ``stop``; a second SIGINT interrupts at once.

    A checkpoint is a rename, so also the second one leaves the last checkpoint whole.
    """

    def __init__(self) -> None:
        self.stop = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes one Ctrl-C on as a SIGTERM as well, so only a repeated SIGINT means impatience.
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True
