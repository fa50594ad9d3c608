"""The log of one rank in the run folder, by ``logging``: what it said, Python's warnings, libraries' messages."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO

from cml_dist.telemetry.console import LOG
from cml_dist.telemetry.text import printable


class _Printable(logging.Formatter):
    """For people with a terminal: what a library or a name in a file says may hold control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


FORMAT = _Printable("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S")


class RankLog:
    """``logs/rank-00003.log``, continued by each start of the run.

    What comes before :meth:`open` is kept in memory until then: a run that never begins leaves no file. A log that
    cannot be written costs one warning on standard error, and not the run. Python's warnings and the messages of
    libraries are shown on the screen by rank 0 alone.

    Attributes:
        file: the file once it is open, for what is written past ``logging``: stack dumps.
    """

    def __init__(self, rank: int) -> None:
        self._rank, self._root = rank, logging.getLogger()
        self.file: TextIO | None = None
        self._early = MemoryHandler(capacity=1000, flushLevel=sys.maxsize)
        self._handlers: list[logging.Handler] = []
        self._add(self._early)
        if rank == 0:
            self._add(_Screen(logging.WARNING))
        logging.captureWarnings(True)

    def _add(self, handler: logging.Handler) -> None:
        self._handlers.append(handler)
        self._root.addHandler(handler)

    def open(self, folder: Path, header: str) -> None:
        """From now on write to the file in ``folder``: the header of this start, then what has come up so far."""
        if self._early not in self._root.handlers:
            return
        self._root.removeHandler(self._early)
        path = folder / f"rank-{self._rank:05d}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _File(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            _warn_not_written(path, error)
            return
        file.setFormatter(FORMAT)
        self._add(file)
        file.handle(logging.makeLogRecord({"levelname": "INFO", "msg": header}))
        self._early.setTarget(file)
        self._early.flush()
        self.file = file.stream

    def failed(self, error: BaseException) -> None:
        """Keep how this start ended, with its traceback."""
        LOG.error("%s: %s", type(error).__name__, error, exc_info=error)

    def close(self) -> None:
        """Close the file; what was never written is forgotten."""
        logging.captureWarnings(False)
        for handler in self._handlers:
            self._root.removeHandler(handler)
            handler.close()


class _Screen(logging.Handler):
    """Standard error as it is now (a live display takes its place), for all but what a console has shown."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != LOG.name:
            print(printable(self.format(record)).rstrip(), file=sys.stderr)


class _File(logging.FileHandler):
    """A file that may fail, e.g. on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        _warn_not_written(Path(self.baseFilename), sys.exc_info()[1])
        logging.getLogger().removeHandler(self)
        self.close()

    def close(self) -> None:
        with suppress(OSError):  # what it still holds cannot be written either
            super().close()


def _warn_not_written(path: Path, error: BaseException | None) -> None:
    reason = getattr(error, "strerror", None) or error
    print(f"warning: {path} cannot be written: {reason}; the run goes on without this log", file=sys.stderr)
