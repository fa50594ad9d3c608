"""One trainer writes a run folder: also after a requeue, while the old job still lives on a node that was cut off.

Two means. ``lock`` is held (flock) while a process lives; a killed one lets go at once. ``lease.json`` names the
writer, who looks at it before each write: a later start of the same job (:meth:`Start.succeeds`) takes it over, held or
not, and a file system without locks has this alone. Until the old writer lets go the new one has no lock; ``lock``
names the last one that had it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
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

LATER_S = 3600.0
"""An earlier start is kept out for so long after a later one renewed its lease: its meta-steps may take minutes."""

AGAIN_S = 1.0

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
        # Not emptied: the file of the holder must survive a refused second trainer.
        self._lock: TextIO | None = os.fdopen(os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        try:
            self._take()
        except BaseException:
            self._lock.close()
            raise
        self._released = threading.Event()
        # Of its own: between two writes of the trainer there may be a long step, or the loading of data.
        self._renewing = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._renewing.start()

    def _keep(self) -> None:
        while not self._released.wait(FRESH_S / 6):
            try:
                self.renew()
            except CheckpointError:  # the trainer finds out before it writes
                return

    def _take(self) -> None:
        holder = self._read()
        try:
            quiet_s = time.time() - self._file.stat().st_mtime
        except FileNotFoundError:  # none, or put away just now
            holder, quiet_s = None, 0.0
        held, locks = False, True
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            locks = False
            held = holder is not None and quiet_s < FRESH_S
        if locks and not held:
            # Free, but not for us where its file is gone, or whose lease it is has not come to take it yet.
            awaited = holder is not None and quiet_s < FRESH_S and self._last_locked() != holder["token"]
            held = awaited or not self._lock_is_there()
        if holder and quiet_s < LATER_S and _start_of(holder).succeeds(self._start):
            # It may not have the lock yet, which its predecessor lets go only now, to be started again in place.
            raise self._taken_over(holder)
        if held and not (holder and self._start.succeeds(_start_of(holder))):
            who = f" (pid {holder['pid']} on {holder['host']})" if holder else ""
            raise CheckpointError(
                f"another process trains in run.dir {self._folder}{who}",
                "wait for it, stop it, or choose another run.dir",
            )
        fresh = self._file.with_name(f".lease.json.{self._token}")
        try:
            if locks and not held:
                self._mark_locked()
            fresh.write_text(json.dumps({"token": self._token, **asdict(self._start)}) + "\n")
            os.replace(fresh, self._file)
        except OSError:  # no space
            fresh.unlink(missing_ok=True)
            raise

    def _last_locked(self) -> str:
        """The token of the last lease whose owner held the lock."""
        return os.pread(self._lock.fileno(), len(self._token), 0).decode(errors="replace")

    def _mark_locked(self) -> None:
        """Only who holds the lock writes into its file."""
        os.pwrite(self._lock.fileno(), self._token.encode(), 0)

    def _lock_is_there(self) -> bool:
        """Whether the file that is locked is still the folder's: a run that never began removes it as it leaves."""
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self._lock_file))
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Make sure that the lease is still ours, right before something is written.

        Raises:
            CheckpointError: a later start of this job has taken over; nothing more may be written.
        """
        holder = self._read()
        if holder is None:  # a file server may have been away for a moment
            time.sleep(AGAIN_S)
            holder = self._read()
        if holder is None or holder["token"] != self._token:
            raise self._taken_over(holder)

    def _taken_over(self, holder: dict[str, Any] | None) -> CheckpointError:
        who = f"pid {holder['pid']} on {holder['host']}" if holder else "an unknown process"
        return CheckpointError(
            f"a later start of this run has taken over {self._folder} ({who})",
            "nothing is lost: that one goes on from the last checkpoint",
        )

    def renew(self) -> None:
        """Show that the owner lives, and lock what was taken over once its old owner has gone; see :meth:`check`."""
        self.check()
        # Also released meanwhile, by the trainer's own thread.
        with suppress(OSError, AttributeError, TypeError, ValueError):
            os.utime(self._file)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._last_locked() != self._token:
                self._mark_locked()

    def release(self, *, began: bool) -> None:
        """Let others in; where the run never ``began``, leave no trace."""
        if self._lock is None:
            return
        self._released.set()
        self._renewing.join(AGAIN_S)  # no longer: its file server may hang
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
        return found if isinstance(found, dict) and {"token", "host", "pid"} <= found.keys() else None


_START = tuple(field.name for field in fields(Start))


def _start_of(holder: dict[str, Any]) -> Start:
    """Whose lease it is; earlier versions said less."""
    return Start(**{name: holder[name] for name in _START if name in holder})
