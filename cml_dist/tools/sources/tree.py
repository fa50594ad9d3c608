"""A source of images to pack: a folder, a zip, or a folder that holds zips, seen as one tree of files."""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cml_dist.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class SourceTree:
    """Files by path (``/`` between parts, sorted), read one at a time; safe to read from threads.

    Args:
        where: the source, for errors.
        readers: for each path, a function that returns its bytes.
    """

    def __init__(self, where: str, readers: Mapping[str, Callable[[], bytes]]) -> None:
        self.where = where
        self._readers = readers
        self.paths = sorted(readers, key=natural_order)

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            DataError: naming the file, if it is damaged or unreadable.
        """
        try:
            return self._readers[path]()
        except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, NotImplementedError, ValueError) as error:
            raise DataError(f"{path} in {self.where} cannot be read ({error})", "replace the source") from error

    def lines(self, path: str) -> list[str]:
        """The non-empty lines of a text file."""
        try:
            text = self.read(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} in {self.where} is no UTF-8 text ({error})", "save it as UTF-8") from error
        return [line.strip() for line in text.splitlines() if line.strip()]

    def images(self) -> list[str]:
        return [path for path in self.paths if is_image(path)]


def open_source(source: str | os.PathLike[str]) -> SourceTree:
    """Opens a folder, a zip, or a tar of the original CIFAR-100.

    Raises:
        DataError: if there is none, or it is of another kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return SourceTree(str(path), _folder_readers(path))
    if not path.exists():
        raise DataError(f"there is no source {path}", "check the path")
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return SourceTree(str(path), _tar_readers(path))
    if zipfile.is_zipfile(path):
        return SourceTree(str(path), _zip_readers(path))
    kind = "a truncated zip" if path.suffix == ".zip" else "neither a folder nor a zip"
    raise DataError(f"source {path} is {kind}", "give a folder, a zip, or cifar-100-python.tar.gz")


@dataclass(frozen=True)
class Item:
    """An image to pack: where it goes, and how to get its bytes."""

    split: str
    class_name: str
    key: str
    path: str
    read: Callable[[], bytes]


def items_of(tree: SourceTree, split: str, name: str, paths: Iterable[str]) -> list[Item]:
    """The items of one class, in the order of ``paths``."""
    return [Item(split, name, f"{name}/{PurePosixPath(path).stem}", path, _reader(tree, path)) for path in paths]


def _reader(tree: SourceTree, path: str) -> Callable[[], bytes]:
    return lambda: tree.read(path)


def is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES)


def natural_order(path: str) -> tuple[list[list[str | int]], str]:
    """A key by which ``character2`` sorts before ``character10``, folder by folder."""
    # Splitting at digits gives text, number, text, ...: the same kind at each place, so that keys can be compared.
    parts = [re.split(r"([0-9]+)", part) for part in path.split("/")]
    return [[int(piece) if place % 2 else piece for place, piece in enumerate(part)] for part in parts], path


def _folder_readers(root: Path) -> dict[str, Callable[[], bytes]]:
    """All files below a folder; zips directly in it appear as folders of their name, as Omniglot is published."""
    readers: dict[str, Callable[[], bytes]] = {}
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not _hidden(name))
        for name in files:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if _hidden(name):
                continue
            if Path(folder) == root and name in ("images_background.zip", "images_evaluation.zip"):
                readers |= _zip_readers(path)
            else:
                readers[relative] = path.read_bytes
    return readers


def _zip_readers(path: Path) -> dict[str, Callable[[], bytes]]:
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} is no readable zip ({error})", "download it again") from error
    wanted = [name for name in names if not name.endswith("/") and not any(map(_hidden, name.split("/")))]
    return {name: _zip_reader(archive, name) for name in wanted}


def _zip_reader(archive: zipfile.ZipFile, name: str) -> Callable[[], bytes]:
    return lambda: archive.read(name)


def _tar_readers(path: Path) -> dict[str, Callable[[], bytes]]:
    """The members of a (compressed) tar, held in memory: meant for CIFAR-100's three files."""
    try:
        with tarfile.open(path) as archive:
            names = [m for m in archive.getmembers() if m.isfile() and m.size < 2**30 and not is_image(m.name)]
            content = {m.name.removeprefix("./"): archive.extractfile(m).read() for m in names}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is no readable tar ({error})", "download it again") from error
    return {name: (lambda data=data: data) for name, data in content.items()}


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
