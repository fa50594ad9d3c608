"""Remote shard sets: downloaded once by fsspec into a local folder, checked, shared by the processes of a machine.

fsspec's own ``filecache`` writes under the final name and knows no checksums: a killed download, or two processes at
once, would leave half a file. Here the folder gets its name when all of it is there and right.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cml_dist.data.base import Progress
from cml_dist.data.publish import make_once, new_folder, user_cache
from cml_dist.data.shard_format import DATASET_BYTES, DATASET_FILE, DatasetInfo, parse_dataset, sha256_of
from cml_dist.errors import DataError

PROTOCOLS = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory")
"""What a remote set may lie behind. fsspec knows more: some start a process, render templates, read local files."""

SILENT_S, GRACE_S, SLOWEST = 60, 60, 1024
"""Seconds without a byte from a server, seconds before its pace counts, and the bytes a second that are then asked."""


def is_remote(root: str) -> bool:
    """Whether ``root`` is an address of one of ``PROTOCOLS``, and not a local folder (a path or ``file:`` URL).

    The only reader of such addresses: a set, a configuration and a run folder may bring one from anybody.

    Raises:
        DataError: it is neither, e.g. ``pipe:COMMAND`` or a chain of file systems (``::``).
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::?)", root)
    if scheme is None or root.startswith("file:"):
        return False
    if scheme[1] not in PROTOCOLS or scheme[2] != "://" or "::" in root:
        raise DataError(
            f"{root[:200]!r} is neither a folder nor an address of a protocol that is opened here",
            f"give a folder (one whose name has a colon as ./NAME), or {'://, '.join(PROTOCOLS[:-2])}://",
        )
    return True


def local_folder(root: str, cache: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> Path:
    """The folder that holds the set: ``root`` itself (a path or ``file:`` URL), or the cached copy of a remote one.

    Copies are kept in ``cache``, by default in the user's cache folder; ``progress`` is called with bytes done and
    total while downloading.

    Raises:
        DataError: if the remote set cannot be fetched, or a file arrives damaged.
    """
    if not is_remote(root):
        return Path(unquote(urlsplit(root).path) if root.startswith("file:") else root).expanduser()
    data, info = description(root)
    # Named by content: a set that changed at its source gets another folder, and never mixes with the old one.
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", info.name)[:60]
    folder = Path(cache or user_cache("shards")) / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"

    def fault() -> str | None:
        return None if (folder / DATASET_FILE).is_file() else f"it has no {DATASET_FILE}"

    def fetch() -> None:
        with new_folder(folder) as fresh:
            _download(root, info, fresh, progress)
            (fresh / DATASET_FILE).write_bytes(data)

    make_once(folder, "domain.cache", fault, fetch)
    return folder


def description(root: str) -> tuple[bytes, DatasetInfo]:
    """What a remote set says of itself, as bytes and read; nothing else of it is fetched.

    Raises:
        DataError: it cannot be fetched, or describes no set.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, DATASET_FILE)
        url = _fetch(root, DATASET_FILE, file, DATASET_BYTES)
        data = file.read_bytes()
    return data, parse_dataset(data, url)


def _download(root: str, info: DatasetInfo, folder: Path, progress: Progress | None) -> None:
    files = (info.index, *info.shards)
    done, total = 0, sum(file.size for file in files)
    if total > (free := shutil.disk_usage(folder).free):
        what = f"the set {root} has {total / 2**30:,.1f} GiB, but {free / 2**30:,.1f} GiB are free in its cache"
        raise DataError(what, "set domain.cache to a folder with more space")
    for file in files:

        def tell(received: int, before: int = done, name: str = file.name) -> None:
            if progress is not None:
                progress(before + received, total, f"downloading {name}")

        path = folder / file.name
        url = _fetch(root, file.name, path, file.size, tell)
        size = path.stat().st_size
        if size != file.size or sha256_of(path) != file.sha256:
            kind = f"{size} bytes, not {file.size}" if size != file.size else "its checksum differs"
            raise DataError(f"{url} arrived damaged or truncated ({kind})", "try again, or repair it at its source")
        done += file.size


def _fetch(root: str, name: str, path: Path, most: int, tell: Callable[[int], object] = lambda received: None) -> str:
    """Fetches a file of the set, of ``most`` bytes at most, and returns its URL; ``tell`` hears of bytes received.

    Raises:
        DataError: it is not there, too large, too slow, or something else fails, which says what to do.
    """
    from fsspec.callbacks import Callback
    from fsspec.core import url_to_fs

    url, began_s = f"{root.rstrip('/')}/{name}", time.monotonic()

    def watch(_: int | None, received: int, **__: object) -> None:
        if received > most:
            raise DataError(f"{url} is larger than the {most:,} bytes it may have", "repair the set at its source")
        if time.monotonic() - began_s > GRACE_S + received / SLOWEST:
            raise DataError(f"{url} comes too slowly ({received:,} bytes so far)", "try again, or copy the set by hand")
        tell(received)

    try:
        system, source = url_to_fs(url, **_patience(url))
        system.get_file(source, str(path), callback=Callback(hooks={"watch": watch}))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist", "check domain.root, or pack and upload the set again") from error
    except Exception as error:  # each protocol has its own errors; fsspec says which package it lacks
        raise DataError(
            f"{url} cannot be fetched ({type(error).__name__}: {str(error)[:300] or 'no answer in time'})",
            "check the address, access, network and free space, or pip install the package that is named",
        ) from error
    return url


def _patience(url: str) -> dict[str, Any]:
    """What http is opened with: time limits for an answer, not for all of a large file; bytes as they are stored."""
    if not url.startswith("http"):
        return {}
    from aiohttp import ClientTimeout

    limits = ClientTimeout(total=None, sock_connect=SILENT_S, sock_read=SILENT_S)
    return {"client_kwargs": {"timeout": limits, "headers": {"Accept-Encoding": "identity"}}}
