"""Folders that appear whole or not at all, and those that one of several processes makes for all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cml_dist.atomic import fsync, refused
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
        CmlError: the file system refused.
    """
    dest = Path(dest).absolute()
    refuse_existing(dest)
    prefix = f".{dest.name}.partial-"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        for path in dest.parent.glob(f"{glob.escape(prefix)}*"):
            if time.time() - path.lstat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
        beside = tempfile.TemporaryDirectory(prefix=prefix, dir=dest.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise refused(dest, error) from error
    with beside as parent:
        folder = Path(parent, dest.name)
        folder.mkdir()
        yield folder
        try:
            for path in (*sorted(folder.iterdir()), folder):
                fsync(path)
            os.rename(folder, dest)
            fsync(dest.parent)
        except OSError as error:
            refuse_existing(dest)  # another process was first
            raise refused(dest, error) from error


def refuse_existing(dest: Path) -> None:
    """Refuses a destination that holds anything.

    Raises:
        DataError: if ``dest`` is a file, or a folder that is not empty.
    """
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise DataError(f"{dest} exists already", "remove it, or choose another destination")


def make_once(folder: Path, setting: str, fault: Callable[[], str | None], make: Callable[[], None]) -> None:
    """Has a cached folder made where it is missing or damaged, by one process of those that ask for it at once.

    They wait for a lock beside it, which the system releases if its holder dies; where the file system has no locks,
    each makes it, and the first to publish wins.

    Args:
        setting: the one that says where the cache is, for the error.
        fault: what is wrong with the folder now; None: nothing.
        make: publishes the folder, see :func:`new_folder`.

    Raises:
        DataError: the cache cannot be written; and what ``make`` raises.
    """
    if fault() is None:
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "a") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            found = fault()  # another process may have made it while this one waited
            if found is None:
                return
            if folder.exists():
                warnings.warn(f"the cached {folder} is made again: {found}", RuntimeWarning, stacklevel=3)
                shutil.rmtree(folder)
            make()
    except DataError:
        if fault() is not None:  # else another process, which no lock held back, was first
            raise
    except OSError as error:
        what = f"cannot keep {folder} ({error.strerror or error})"
        raise DataError(what, f"free space, or set {setting} to a folder that can be written") from error
