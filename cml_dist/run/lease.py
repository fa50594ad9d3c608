"""One trainer writes a run folder: also after a requeue, while the old job still lives on a node that was cut off.

Two means. ``lock`` is held (flock) while a process lives; a killed one lets go at once. ``lease.json`` names the
writer, who looks at it before each write: a later start of the same job (:meth:`Start.succeeds`) takes it over, held or
not, and a file system without locks has this alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

from cml_dist.errors import CheckpointError
from cml_dist.run.status import Start

FRESH_S = 60.0
"""Without locks: a lease that was renewed within this time has a living owner."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that has none."""


class Lease:
    """The right to write in a folder.

    Args:
        folder: it exists.
        start: who asks.

    Raises:
        CheckpointError: another trainer has it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, start: Start) -> None:
        self._folder, self._start = folder, start
        self._file, self._lock_file = folder / "lease.json", folder / "lock"
        self._token = uuid.uuid4().hex
        # "a" and not "w": the file of the holder must survive a refused second trainer.
        self._lock: TextIO | None = open(self._lock_file, "a+")
        try:
            self._take()
        except BaseException:
            self._lock.close()
            raise

    def _take(self) -> None:
        holder = self._read()
        held, locks = False, True
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            locks = False
            held = holder is not None and time.time() - self._file.stat().st_mtime < FRESH_S
        if locks and not held and not os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self._lock_file)):
            held = True  # a run that never began removed this file, and another has made a new one
        if held and not (holder and self._start.succeeds(_start_of(holder))):
            who = f" (pid {holder['pid']} on {holder['host']})" if holder else ""
            raise CheckpointError(
                f"another process trains in run.dir {self._folder}{who}",
                "wait for it, stop it, or choose another run.dir",
            )
        fresh = self._file.with_name(f".lease.json.{self._token}")
        try:
            fresh.write_text(json.dumps({"token": self._token, **asdict(self._start)}) + "\n")
            os.replace(fresh, self._file)
        except OSError:  # no space
            fresh.unlink(missing_ok=True)
            raise

    def check(self) -> None:
        """Make sure that the lease is still ours, right before something is written.

        Raises:
            CheckpointError: a later start of this job has taken over; nothing more may be written.
        """
        holder = self._read()
        if holder is None or holder["token"] != self._token:
            who = f"pid {holder['pid']} on {holder['host']}" if holder else "an unknown process"
            raise CheckpointError(
                f"a later start of this run has taken over {self._folder} ({who})",
                "nothing is lost: that one goes on from the last checkpoint",
            )

    def renew(self) -> None:
        """Show that the owner lives, and lock what was taken over once its old owner has gone; see :meth:`check`."""
        self.check()
        with suppress(OSError):
            os.utime(self._file)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self, *, began: bool) -> None:
        """Let others in; where the run never ``began``, leave no trace."""
        if self._lock is None:
            return
        holder = self._read()
        if holder is not None and holder["token"] == self._token:
            with suppress(OSError):
                self._file.unlink()
                if not began:
                    self._lock_file.unlink()
        self._lock.close()
        self._lock = None

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and {"token", *_START} <= found.keys() else None


_START = tuple(field.name for field in fields(Start))


def _start_of(holder: dict[str, Any]) -> Start:
    """Whose lease it is."""
    return Start(**{name: holder[name] for name in _START})
