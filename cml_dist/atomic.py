"""Files that appear whole or not at all: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cml_dist.errors import CmlError

LEFTOVERS = ".*.writing-*"
"""Pattern of what a killed writer leaves behind."""


@contextmanager
def atomic_file(path: Path, before: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yields a temporary path, which becomes ``path`` when the block ends well; after an error nothing is left.

    Args:
        before: called right before the rename; an error that it raises calls it off.

    Raises:
        OSError: the file system refused; an earlier ``path`` is as it was.
    """
    # A name of its own for each machine, process and thread: two writers never share one.
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.writing-{writer}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        # Made here, and never found: a link that somebody put in its place would be written through.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        fsync(temporary)
        before()
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file, see :func:`atomic_file`.

    Raises:
        CmlError: the file system refused.
    """
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise refused(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write a whole JSON file, see :func:`write_bytes`."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one record to a file of JSON lines, on a line of its own, also after one that a power cut tore.

    Raises:
        CmlError: the file system refused.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    try:
        with open(path, "a+b") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = b"\n" + line
            file.write(line)
    except OSError as error:
        raise refused(path, error) from error


def refused(path: Path, error: OSError) -> CmlError:
    """What the file system said, for people."""
    return CmlError(f"cannot write {path}: {error.strerror or error}", "free space or mend the folder's permissions")


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
