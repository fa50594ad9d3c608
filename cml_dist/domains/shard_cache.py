"""Remote shard sets: downloaded once into a local folder, checked, shared by the processes of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from cml_dist.domains.shard_format import DATASET_FILE, DatasetInfo, FileInfo, Progress, parse_dataset
from cml_dist.errors import DataError

_BLOCK_BYTES = 2**20


def user_cache(*parts: str) -> Path:
    """A folder below the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``); not created."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "cml_dist", *parts)


def is_remote(root: str) -> bool:
    """Whether ``root`` is a URL (or a ``pipe:`` command) of something else than a local folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)|pipe:", root) is not None and not root.startswith("file:")


def local_folder(root: str, cache: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> Path:
    """The folder that holds the set: ``root`` itself, or the cached copy of a remote one.

    Args:
        root: a path, a ``file:`` URL, or a remote URL prefix.
        cache: where copies are kept; None: the user's cache folder.
        progress: called with bytes done and total while downloading.

    Raises:
        DataError: if the remote set cannot be fetched, or a file arrives damaged.
    """
    if is_remote(root):
        return _fetch(root.rstrip("/"), Path(cache) if cache else user_cache("shards"), progress)
    if root.startswith("file:"):
        return Path(unquote(urlsplit(root).path))
    return Path(root).expanduser()


def description(root: str) -> DatasetInfo:
    """What a remote set says of itself; nothing else of it is fetched.

    Raises:
        DataError: it cannot be fetched, or describes no set.
    """
    url = f"{root.rstrip('/')}/{DATASET_FILE}"
    return parse_dataset(b"".join(_stream(url)), url)


def _fetch(root: str, cache: Path, progress: Progress | None) -> Path:
    url = f"{root}/{DATASET_FILE}"
    description = b"".join(_stream(url))
    info = parse_dataset(description, url)
    # Named by content: a set that changed at its source gets another folder, and never mixes with the old one.
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", info.name)[:60]
    folder = cache / f"{name}-{hashlib.sha256(description).hexdigest()[:16]}"
    files = (info.index, *info.shards)
    total = sum(file.size for file in files)
    done = 0
    with _cache_errors(folder), _lock(folder) as alone:
        if alone:
            for leftover in folder.glob(".*.partial-*"):  # of a download that was killed
                leftover.unlink()
        for file in files:
            path = folder / file.name
            if not (path.exists() and path.stat().st_size == file.size):
                report = None
                if progress is not None:
                    report = _shifted(progress, done, total, f"downloading {file.name}")
                _download(f"{root}/{file.name}", path, file, report)
            done += file.size
        if not _holds(folder / DATASET_FILE, description):
            _replace(folder / DATASET_FILE, [description])
    return folder


def _download(url: str, path: Path, file: FileInfo, report: Callable[[int], None] | None) -> None:
    digest = hashlib.sha256()
    received = 0

    def blocks() -> Iterator[bytes]:
        nonlocal received
        for block in _stream(url):
            digest.update(block)
            received += len(block)
            if report is not None:
                report(received)
            yield block
        if received != file.size or digest.hexdigest() != file.sha256:
            kind = f"{received} bytes, not {file.size}" if received != file.size else "its checksum differs"
            raise DataError(f"{url} arrived damaged or truncated ({kind})", "try again, or repair it at its source")

    _replace(path, blocks())


def _holds(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data


def _replace(path: Path, blocks: Iterator[bytes] | list[bytes]) -> None:
    """Writes a file under a temporary name, and gives it its name when it is whole."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    partial = Path(name)
    try:
        with open(handle, "wb") as file:
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # mkstemp's 0600 would keep a shared cache from one's colleagues
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _stream(url: str) -> Iterator[bytes]:
    try:
        with closing(_open(url)) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except GeneratorExit:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist", "check domain.root, or pack and upload the set again") from error
    except ImportError as error:  # fsspec knows the protocol, and says which package does the work
        package = re.search(r'[Ii]nstall (\w+)|"(\w+)" to be installed', str(error))
        remedy = f"pip install {package[1] or package[2]}" if package else "install it"
        raise DataError(f"{url} cannot be fetched: {error}", remedy) from error
    except Exception as error:  # each protocol has its own errors
        raise DataError(
            f"{url} cannot be fetched ({type(error).__name__}: {error})", "check the address, access and network"
        ) from error


def _open(url: str) -> BinaryIO:
    """Opens by fsspec; by webdataset where fsspec does not know the protocol or lacks its package."""
    import fsspec

    from cml_dist.domains.shards import open_by_webdataset

    if url.startswith("pipe:"):
        return open_by_webdataset(url)
    try:
        return fsspec.open(url, "rb").open()
    except (ImportError, ValueError) as first:
        try:
            return open_by_webdataset(url)
        except ValueError:
            raise first from None  # neither knows it, and fsspec names the package to install


def _shifted(progress: Progress, before: int, total: int, what: str) -> Callable[[int], None]:
    return lambda received: progress(before + received, total, what)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """One process downloads; the others wait, and then find the files. Gives whether the lock could be had."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        alone = False
        with suppress(OSError):  # without locks each process downloads for itself, under a name of its own
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        yield alone
    finally:
        os.close(handle)


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write the cache {folder} ({error.strerror or error})", "free space, or set domain.cache"
        ) from error
