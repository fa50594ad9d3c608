"""The log of one rank in the run folder: notes, warnings, errors with their traceback, and how far it was when."""

from __future__ import annotations

import io
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from cml_dist.telemetry.console import Console


class RankLog:
    """``logs/rank-00003.log``, continued by each start of the run; every line begins with its time.

    What is said before :meth:`open` is kept in memory until then: a run that never begins leaves no file. A log that
    cannot be written costs one warning on standard error, and not the run.

    Args:
        rank: this process.

    Attributes:
        console: writes here.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._lines = _Lines(f"the log of rank {rank}")
        self.console = Console(self._lines, interactive=False)
        self._shown = warnings.showwarning
        warnings.showwarning = self._warning  # type: ignore[assignment]

    @property
    def file(self) -> TextIO | None:
        """The open file, for what is written past this module: stack dumps."""
        return self._lines.file

    def open(self, folder: Path, header: str) -> None:
        """From now on write to the file in ``folder``: the header of this start, then what has come up so far."""
        if self._lines.file is None:
            self._lines.open(folder / f"rank-{self.rank:05d}.log", header)

    def failed(self, error: BaseException) -> None:
        """Keep how this start ended, with its traceback."""
        self.console.error(f"{type(error).__name__}: {error}")
        for line in "".join(traceback.format_exception(error)).splitlines():
            self.console.note(line)

    def close(self) -> None:
        """Close the file; what was never opened is forgotten."""
        if warnings.showwarning == self._warning:
            warnings.showwarning = self._shown
        self._lines.end()

    def _warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Python's warnings: of rank 0, and of all until the log is open, on screen as well."""
        if file is None:
            self.console.warn(f"{filename}:{lineno}: {category.__name__}: {message}")
        if file is not None or self.rank == 0 or self._lines.file is None:
            self._shown(message, category, filename, lineno, file, line)


class _Lines(io.TextIOBase):
    """Text to whole lines with their time: in memory, then in a file. Nothing is synced: that would cost too much."""

    encoding = "utf-8"

    def __init__(self, what: str) -> None:
        self._what = what
        self._rest = ""
        self._early: list[str] | None = []  # None: lines go to the file, or nowhere
        self.file: TextIO | None = None

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._put(f"{_now()}  {line.rstrip()}\n")
        return len(text)

    def open(self, path: Path, header: str) -> None:
        early, self._early = self._early or [], None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            self._give_up(error)
        for line in (f"{_now()}  {header}\n", *early):
            self._put(line)

    def end(self) -> None:
        self._early = None
        file, self.file = self.file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._give_up(error)

    def _put(self, line: str) -> None:
        if self._early is not None:
            self._early.append(line)
        elif self.file is not None:
            try:
                self.file.write(line)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        file, self.file = self.file, None
        if file is not None:
            with suppress(OSError):  # what it still holds cannot be written either
                file.close()
        Console().warn(f"{self._what} cannot be written: {error.strerror}; the run goes on without it")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")
