"""Remote shard sets: downloaded once by fsspec into a local folder, checked, shared by the processes of a machine.

fsspec's own ``filecache`` writes under the final name and knows no checksums: a killed download, or two processes at
once, would leave half a file. Here the folder gets its name when all of it is there and right.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cml_dist.data.base import Progress
from cml_dist.data.publish import make_once, new_folder, user_cache
from cml_dist.data.shard_format import DATASET_FILE, DatasetInfo, parse_dataset, sha256_of
from cml_dist.errors import DataError


def is_remote(root: str) -> bool:
    """Whether ``root`` is a URL of something else than a local folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)", root) is not None and not root.startswith("file:")


def local_folder(root: str, cache: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> Path:
    """The folder that holds the set: ``root`` itself (a path or ``file:`` URL), or the cached copy of a remote one.

    Copies are kept in ``cache``, by default in the user's cache folder; ``progress`` is called with bytes done and
    total while downloading.

    Raises:
        DataError: if the remote set cannot be fetched, or a file arrives damaged.
    """
    if root.startswith("file:"):
        return Path(unquote(urlsplit(root).path))
    if not is_remote(root):
        return Path(root).expanduser()
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
    with _remote(root, DATASET_FILE) as (system, path, url):
        data = system.cat_file(path)
    return data, parse_dataset(data, url)


def _download(root: str, info: DatasetInfo, folder: Path, progress: Progress | None) -> None:
    from fsspec.callbacks import Callback

    files = (info.index, *info.shards)
    done, total = 0, sum(file.size for file in files)
    for file in files:

        def tell(_: int, received: int, before: int = done, name: str = file.name, **__: object) -> None:
            if progress is not None:
                progress(before + received, total, f"downloading {name}")

        path = folder / file.name
        with _remote(root, file.name) as (system, source, url):
            system.get_file(source, str(path), callback=Callback(hooks={"progress": tell}))
        size = path.stat().st_size
        if size != file.size or sha256_of(path) != file.sha256:
            kind = f"{size} bytes, not {file.size}" if size != file.size else "its checksum differs"
            raise DataError(f"{url} arrived damaged or truncated ({kind})", "try again, or repair it at its source")
        done += file.size


@contextmanager
def _remote(root: str, name: str) -> Iterator[tuple]:
    """(file system, path in it, URL) of a file of the set; what fails with them is an error that says what to do."""
    from fsspec.core import url_to_fs

    url = f"{root.rstrip('/')}/{name}"
    try:
        yield (*url_to_fs(url), url)
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist", "check domain.root, or pack and upload the set again") from error
    except Exception as error:  # each protocol has its own errors; fsspec says which package it lacks
        raise DataError(
            f"{url} cannot be fetched ({type(error).__name__}: {error})",
            "check the address, access, network and free space, or pip install the package that is named",
        ) from error
