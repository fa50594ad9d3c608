"""A folder that appears whole or not at all: written beside its final name, then renamed."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from pathlib import Path

from cml_dist.atomic import fsync
from cml_dist.errors import DataError


class FolderInMaking:
    """A temporary sibling of ``dest`` that becomes ``dest`` in one rename.

    What a killed run left beside ``dest`` is removed first; the folder of a run that is still alive is known by its
    lock and left alone.

    Args:
        dest: the folder to publish; it must not exist (an empty folder is accepted).

    Raises:
        DataError: if ``dest`` exists already: remove it, or choose another name.
    """

    def __init__(self, dest: str | os.PathLike[str]) -> None:
        self.dest = Path(dest).absolute()
        refuse_existing(self.dest)
        self.dest.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self.path, self._lock = self._create()

    def publish(self) -> None:
        """Flushes the folder to the disk and gives it its final name."""
        for file in sorted(self.path.iterdir()):
            fsync(file)
        fsync(self.path)
        refuse_existing(self.dest)
        os.chmod(self.path, 0o777 & ~_umask())  # mkdtemp's 0700 would hide the set from one's colleagues
        try:
            os.rename(self.path, self.dest)
        except OSError:
            refuse_existing(self.dest)
            raise
        fsync(self.dest.parent)
        os.close(self._lock)

    def discard(self) -> None:
        """Removes everything that was written."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    @property
    def _prefix(self) -> str:
        return f".{self.dest.name}.partial-"

    def _remove_leftovers(self) -> None:
        for folder in self.dest.parent.glob(f"{glob.escape(self._prefix)}*"):
            lock, state = _try_lock(folder)
            if state == "held":  # nobody else holds it: its run is dead
                shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)

    def _create(self) -> tuple[Path, int]:
        while True:
            path = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.dest.parent))
            lock, state = _try_lock(path)
            # Another run may take the folder for a leftover before the lock is held: then make a new one.
            if lock is not None and state != "taken" and path.exists():
                return path, lock
            if lock is not None:
                os.close(lock)


def refuse_existing(dest: Path) -> None:
    """Refuses a destination that holds anything.

    Raises:
        DataError: if ``dest`` is a file, or a folder that is not empty.
    """
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise DataError(f"{dest} exists already", "remove it, or choose another destination")


def _try_lock(folder: Path) -> tuple[int | None, str]:
    """A handle of the folder, and ``"held"`` if it holds the lock until it is closed (or its process dies).

    ``"taken"``: another process holds it. ``"unknown"``: the file system has no locks.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None, "gone"
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return handle, "taken"
    except OSError:
        return handle, "unknown"
    return handle, "held"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
