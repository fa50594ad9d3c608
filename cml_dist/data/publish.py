"""Folders that appear whole or not at all, and work that one of several processes does for all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cml_dist.atomic import fsync
from cml_dist.errors import DataError

_ABANDONED_S = 24 * 3600  # what nobody touched for so long is the work of a killed process


def user_cache(*parts: str) -> Path:
    """A folder below the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``); not created."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "cml_dist", *parts)


@contextmanager
def new_folder(dest: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, which gets the name ``dest`` in one rename when the block ends; an error leaves nothing.

    What a killed process left beside ``dest`` is removed after a day.

    Raises:
        DataError: ``dest`` exists already (an empty folder is accepted).
    """
    dest = Path(dest).absolute()
    refuse_existing(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{dest.name}.partial-"
    remove_abandoned(dest.parent, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=dest.parent, ignore_cleanup_errors=True) as beside:
        folder = Path(beside, dest.name)
        folder.mkdir()
        yield folder
        for path in (*sorted(folder.iterdir()), folder):
            fsync(path)
        try:
            os.rename(folder, dest)
        except OSError:
            refuse_existing(dest)  # another process was first
            raise
        fsync(dest.parent)


def refuse_existing(dest: Path) -> None:
    """Refuses a destination that holds anything.

    Raises:
        DataError: if ``dest`` is a file, or a folder that is not empty.
    """
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise DataError(f"{dest} exists already", "remove it, or choose another destination")


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes what killed processes left: files and folders with this prefix that are older than a day."""
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, by a lock file beside ``folder``; the system releases it if the process dies.

    On a file system without locks nobody waits: the caller must bear that several do the same work.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
