"""One trainer writes a run folder: also after a requeue, while the old job still runs on a node that was cut off.

The file ``lock`` is locked (flock) while its writer lives, and names it with a generation number, which each writer
raises. A requeued job replaces the lock of its earlier start, which finds another generation there before its next
write. On a file system without locks the generation alone decides: the later writer has the folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cml_dist.atomic import atomic_file
from cml_dist.distributed.env import Start
from cml_dist.errors import CheckpointError

AGAIN_S = 1.0
"""A file server may be away for a moment."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that has none."""


class Lease:
    """The right of ``start`` to write in a folder that exists, until :meth:`release` or the end of the process.

    Raises:
        CheckpointError: another trainer has it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, start: Start) -> None:
        self._path, self._files = folder / "lock", []
        os.register_at_fork(after_in_child=self._close)  # a loader process that outlives us must not hold it
        try:
            holder = self._read()
            same_job = start.job is not None and holder.get("job") == start.job
            if same_job and holder["requeued"] > start.requeued:
                raise self._taken_over(holder)
            if not self._lock(self._path) and not (same_job and holder["requeued"] < start.requeued):
                raise CheckpointError(
                    f"another process trains in run.dir {folder}{_name(holder)}",
                    "wait for it, stop it, or choose another run.dir",
                )
            self._mine = {"generation": holder.get("generation", 0) + 1, **asdict(start)}
            with atomic_file(self._path) as fresh:  # locked already when it appears
                self._lock(fresh)
                fresh.write_text(json.dumps(self._mine) + "\n")
        except BaseException:
            self._close()
            raise

    def check(self) -> None:
        """Raise CheckpointError where a later start has taken over, so that nothing more may be written."""
        holder = self._read()
        if not holder:
            time.sleep(AGAIN_S)
            holder = self._read()
        if holder != self._mine:
            raise self._taken_over(holder)

    def release(self, *, began: bool) -> None:
        """Let others in; where the run never ``began``, leave no trace."""
        if not began and self._read() == self._mine:
            with suppress(OSError):
                self._path.unlink()
        self._close()

    def _taken_over(self, holder: dict[str, Any]) -> CheckpointError:
        return CheckpointError(
            f"a later start of this run has taken over {self._path.parent}{_name(holder)}",
            "nothing is lost: that one goes on from the last checkpoint",
        )

    def _lock(self, path: Path) -> bool:
        """Lock a file until :meth:`_close`; False where another process holds it."""
        self._files.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        try:
            fcntl.flock(self._files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return True

    def _close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def _read(self) -> dict[str, Any]:
        """What the lock says of its writer; nothing where it is torn, or of an earlier version."""
        try:
            found = json.loads(self._path.read_text())
            numbers = all(type(found[key]) is int for key in ("generation", "pid", "requeued"))
            return found if numbers and isinstance(found["host"], str) else {}
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return {}


def _name(holder: dict[str, Any]) -> str:
    return f" (pid {holder['pid']} on {holder['host']})" if holder else ""
