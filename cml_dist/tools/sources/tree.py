"""A source of images to pack: a folder, a zip or a tar, seen as one tree of files under plain names."""

from __future__ import annotations

import math
import mimetypes
import os
import posixpath
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cml_dist.data.pixels import picture_suffixes
from cml_dist.errors import DataError
from cml_dist.tools.sources.archives import Member, Met, tar_members, zip_members
from cml_dist.tools.sources.known_splits import known_sets

SYSTEM, LOOP = "of the system or of a tool", "a link to a folder that it lies in"
"""Why files are left out that nobody misses."""

ARCHIVE = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)

_SYSTEM = re.compile(
    r"(^|/)((__MACOSX|\.git|\.svn|\.ipynb_checkpoints|\.AppleDouble|\.Trash[^/]*|@eaDir|\$RECYCLE\.BIN)/"
    r"|(\._[^/]*|\.DS_Store|\.directory|Thumbs\.db|desktop\.ini)$)",
    re.IGNORECASE,
)
_MAGIC = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")  # PNG, JPEG, GIF, TIFF


class OverLimit(DataError):
    """A file asks for more than the limits allow: never left out, for the user decides."""


class Limits(NamedTuple):
    """What a source may ask for: bytes of a file as unpacked (MiB), pixels of an image, files and folders in all."""

    member_mib: float = 1024
    pixels: int = 89_478_485  # Pillow's own
    files: int = 2_000_000


class SourceTree:
    """Files by plain name (see ``plain_name``), read one at a time; safe to read from threads.

    Attributes:
        where: names the source in errors; ``scratch``: the folder for what has to be unpacked.
        files: by path, in natural order.
        images: those paths that Pillow can open.
        left: (path, reason) of what was met and cannot be read.
        used: paths of lists and of files with arrays, that were opened.
    """

    def __init__(
        self, where: str, met: Met, limits: Limits | None = None, scratch: str | os.PathLike[str] | None = None
    ) -> None:
        self.where, self.limits, self.scratch = where, limits or Limits(), scratch
        self.left: list[tuple[str, str]] = []
        self.used: set[str] = set()
        files: dict[str, Member] = {}
        for count, (name, member) in enumerate(met, start=1):
            self.check_count(count)
            path = plain_name(name)
            if isinstance(member, str):
                self.left.append((path, member))
            elif member is not None and _SYSTEM.search(path):
                self.left.append((path, SYSTEM))
            elif member is not None and files.setdefault(path, member) is not member:
                self.left.append((path, "another file has the same name"))
        self.files = {path: files[path] for path in sorted(files, key=natural_order)}
        suffixes = picture_suffixes()
        self.images = [path for path in self.files if self._is_picture(path, suffixes)]

    def _is_picture(self, path: str, suffixes: set[str]) -> bool:
        """By its suffix; where nobody knows that, by its first bytes."""
        suffix = posixpath.splitext(path)[1].lower()
        if suffix in suffixes or mimetypes.guess_type(f"x{suffix}")[0]:
            return suffix in suffixes
        try:
            with self.files[path].open() as stream:
                return stream.read(8).startswith(_MAGIC)
        except Exception:  # it is found again where it is read
            return False

    def open(self, path: str) -> BinaryIO:
        """The stream of a list or of a file with arrays, which counts as used.

        Raises:
            DataError: naming the file, if it is unreadable or above the limit of bytes.
        """
        self.used.add(path)
        return self._open(path)

    def _open(self, path: str) -> BinaryIO:
        self.check_size(path, self.files[path].size)
        with self.reading(path):
            return self.files[path].open()

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            DataError: naming the file, if it is damaged, unreadable or above the limit of bytes.
        """
        with self._open(path) as stream, self.reading(path):
            data = stream.read(int(self.limits.member_mib * 2**20) + 1)  # whatever size was declared
        self.check_size(path, len(data))
        return data

    def lines(self, path: str) -> list[str]:
        """The non-empty lines of a list."""
        self.used.add(path)
        try:
            text = self.read(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} in {self.where} is no UTF-8 text ({error})", "save it as UTF-8") from error
        return [line.strip() for line in text.splitlines() if line.strip()]

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Turn what a damaged file or archive raises into an error that names it."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # zlib, lzma, zipfile, numpy and pyarrow each raise their own
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path} in {self.where} cannot be read ({reason})", "replace the source") from error

    def check_count(self, count: int) -> None:
        if count > self.limits.files:
            what = f"{self.where} holds more than {self.limits.files:,} files and folders"
            raise OverLimit(what, f"where that is right, raise the limit: --max-files {10 * self.limits.files}")

    def check_size(self, path: str, size: int) -> None:
        if size > self.limits.member_mib * 2**20:
            raise OverLimit(
                f"{path} in {self.where} unpacks to more than {self.limits.member_mib:g} MiB",
                f"where that is right, raise the limit: --max-member-mib {math.ceil(size / 2**20)}",
            )

    def find(self, name: str) -> list[str]:
        """The images that a list may mean by this name: of the same file name, those with most folders in common.

        Upper and lower case, and a suffix that the list leaves out, make no difference where the rest is unique.
        """
        parts = plain_name(name).split("/")
        last = parts[-1].lower()
        return _longest_tail(parts, self._by_name.get(last) or self._by_stem.get(last, ()))

    def find_folder(self, name: str) -> list[str]:
        """The folders that a list may mean by this name, as ``find``."""
        parts = plain_name(name).split("/")
        return _longest_tail(parts, self._folders.get(parts[-1], ()))

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        return _grouped(self.images, lambda path: posixpath.basename(path).lower())

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return _grouped(self.images, lambda path: posixpath.splitext(posixpath.basename(path))[0].lower())

    @cached_property
    def _folders(self) -> dict[str, list[str]]:
        """Folders that hold images at any depth, by their own name."""
        folders: dict[str, None] = {}
        for folder in dict.fromkeys(map(posixpath.dirname, self.images)):
            while folder and folder not in folders:
                folders[folder] = None
                folder = posixpath.dirname(folder)
        return _grouped(folders, posixpath.basename)


def _grouped(paths: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(key(path), []).append(path)
    return groups


def _longest_tail(parts: list[str], paths: Iterable[str]) -> list[str]:
    def common(path: str) -> int:
        pairs = zip(reversed(parts), reversed(path.split("/")), strict=False)
        # The last part may differ in case and suffix: it counts, but ends nothing.
        same = [a == b for a, b in pairs]
        return same[0] + (same[1:] + [False]).index(False)

    lengths = {path: common(path) for path in paths}
    return [path for path, length in lengths.items() if length == max(lengths.values())]


def plain_name(name: str) -> str:
    """A path as it is compared: ``/`` between parts, without ``.``, ``..`` or a root, in Unicode's NFC."""
    text = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", name)  # JSON may have such
    return posixpath.normpath("/" + unicodedata.normalize("NFC", text).strip().replace("\\", "/")).lstrip("/")


def natural_order(path: str) -> tuple[list[list[str | int]], str]:
    """A key by which ``character2`` sorts before ``character10``, folder by folder."""
    # Splitting at digits gives text, number, text, ...: the same kind at each place, so that keys can be compared.
    parts = [re.split(r"([0-9]+)", part) for part in path.split("/")]
    return [[int(piece) if place % 2 else piece for place, piece in enumerate(part)] for part in parts], path


def open_source(
    source: str | os.PathLike[str], limits: Limits | None = None, scratch: str | os.PathLike[str] | None = None
) -> SourceTree:
    """Opens a folder, a zip or a tar; a compressed tar is unpacked into a file in ``scratch`` that has no name.

    Raises:
        DataError: if there is none, it is of another kind, or above the limits.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"there is no source {path}", "check the path")
    try:
        if path.is_dir():
            met = _folder_members(path, scratch)
        elif path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
            met = zip_members(path)
        elif ARCHIVE.search(path.name):
            met = tar_members(path, scratch)
        else:
            what = f"source {path} is neither a folder nor an archive"
            raise DataError(what, "give a folder, a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz")
        return SourceTree(str(path), met, limits, scratch)
    except DataError:
        raise
    except Exception as error:  # zipfile, tarfile and what they unpack with raise many kinds
        raise DataError(f"source {path} is damaged or truncated ({error})", "download it again") from error


def _folder_members(root: Path, scratch: str | os.PathLike[str] | None) -> Met:
    """All that lies below a folder, links followed; archives in which a known set is published appear as unpacked."""
    words = {word for known in known_sets().values() for name in known.files for word in name.split()}
    published = set(filter(ARCHIVE.search, words))
    status = root.stat()
    pending = [(str(root), "", ((status.st_dev, status.st_ino),))]
    while pending:
        folder, prefix, above = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            yield prefix, f"a folder that cannot be read ({error.strerror})"
            continue
        for entry in entries:
            name = prefix + entry.name
            try:
                status = entry.stat()
            except OSError:
                yield name, "a link that leads nowhere"
                continue
            here = (status.st_dev, status.st_ino)
            if entry.is_dir() and here in above:
                yield name, LOOP
            elif entry.is_dir():
                yield name, None
                pending.append((entry.path, f"{name}/", (*above, here)))
            elif not entry.is_file():
                yield name, "no regular file"
            elif name in published:
                path = Path(entry.path)
                yield from zip_members(path) if name.endswith(".zip") else tar_members(path, scratch)
            else:
                yield name, Member(status.st_size, partial(open, entry.path, "rb"))
