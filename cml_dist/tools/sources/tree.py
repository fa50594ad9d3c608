"""A source of images to pack: a folder, a zip, or a folder that holds zips, seen as one tree of files."""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from cml_dist.errors import DataError

Readers = Mapping[str, Callable[[], bytes]]
"""For each path a function that returns the bytes of the file."""

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class SourceTree:
    """Files by path (``/`` between parts, in natural order), read one at a time; safe to read from threads.

    Hidden files and those of macOS's archives are left out; ``where`` names the source in errors.
    """

    def __init__(self, where: str, readers: Readers) -> None:
        self.where = where
        self._readers = readers
        shown = (path for path in readers if not re.search(r"(^|/)(\.|__MACOSX(/|$))", path))
        self.paths = sorted(shown, key=natural_order)
        self.images = [path for path in self.paths if path.lower().endswith(_IMAGE_SUFFIXES)]

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

    def folders_of(self, *names: str) -> list[str]:
        """The folders that hold a file of one of these names; ``""`` is the source itself."""
        return sorted({path.rpartition("/")[0] for path in self.paths if path.rpartition("/")[2] in names})


def join(folder: str, name: str) -> str:
    """The path of a file in a folder of a tree, of which ``""`` is the first."""
    return f"{folder}/{name}" if folder else name


def open_source(source: str | os.PathLike[str]) -> SourceTree:
    """Opens a folder, a zip, or a tar of the original CIFAR-100.

    Raises:
        DataError: if there is none, or it is of another kind.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"there is no source {path}", "check the path")
    try:
        if path.is_dir():
            readers = _folder_readers(path)
        elif path.name.endswith((".tar", ".tar.gz", ".tgz")):
            readers = _tar_readers(path)
        elif path.suffix == ".zip" or zipfile.is_zipfile(path):
            readers = _zip_readers(path)
        else:
            what = f"source {path} is neither a folder nor a zip"
            raise DataError(what, "give a folder, a zip, or cifar-100-python.tar.gz")
    except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"source {path} is damaged or truncated ({error})", "download it again") from error
    return SourceTree(str(path), readers)


def natural_order(path: str) -> tuple[list[list[str | int]], str]:
    """A key by which ``character2`` sorts before ``character10``, folder by folder."""
    # Splitting at digits gives text, number, text, ...: the same kind at each place, so that keys can be compared.
    parts = [re.split(r"([0-9]+)", part) for part in path.split("/")]
    return [[int(piece) if place % 2 else piece for place, piece in enumerate(part)] for part in parts], path


def _folder_readers(root: Path) -> Readers:
    """All files below a folder; the two zips in which Omniglot is published appear as folders of their name."""
    readers: dict[str, Callable[[], bytes]] = {}
    for path in root.rglob("*"):
        if path.parent == root and path.name in ("images_background.zip", "images_evaluation.zip"):
            readers |= _zip_readers(path)
        elif not path.is_dir():  # a link that leads nowhere is to be seen
            readers[path.relative_to(root).as_posix()] = path.read_bytes
    return readers


def _zip_readers(path: Path) -> Readers:
    archive = zipfile.ZipFile(path)
    return {name: partial(archive.read, name) for name in archive.namelist() if not name.endswith("/")}


def _tar_readers(path: Path) -> Readers:
    """The members of a (compressed) tar, held in memory: meant for CIFAR-100's three files."""
    with tarfile.open(path) as archive:
        members = [m for m in archive.getmembers() if m.isfile() and not m.name.lower().endswith(_IMAGE_SUFFIXES)]
        content = {m.name.removeprefix("./"): archive.extractfile(m).read() for m in members}
    return {name: partial(bytes, data) for name, data in content.items()}
