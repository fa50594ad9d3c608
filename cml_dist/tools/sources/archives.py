"""What archives hold: names, sizes and streams of their members, in memory that does not grow with them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from cml_dist.errors import DataError


class Member(NamedTuple):
    """A file: its size in bytes as unpacked, and how to open it; safe from threads."""

    size: int
    open: Callable[[], BinaryIO]


Met = Iterable[tuple[str, Member | str | None]]
"""What a source holds, by name: a file, or why it is left out; None: a folder."""

_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by the first two bytes
_HEADER_BYTES = 2**20  # of a tar; one that asks for more is made to hurt
_LINK = "a link in an archive to what it does not hold"


def zip_members(path: Path) -> Met:
    """The members of a zip."""
    archive = zipfile.ZipFile(HeldFile(os.open(path, os.O_RDONLY)).open(0, path.stat().st_size))
    for info in archive.infolist():
        if info.filename.endswith(("/", "\\")):
            yield info.filename, None
        elif stat.S_ISLNK(info.external_attr >> 16):
            yield info.filename, _LINK
        elif info.flag_bits & 1:
            yield info.filename, "encrypted"
        else:
            yield info.filename, Member(info.file_size, partial(archive.open, info))


def tar_members(path: Path, scratch: str | os.PathLike[str] | None) -> Met:
    """The members of a tar, links to others of them included; a compressed one is unpacked into ``scratch`` first."""
    with path.open("rb") as packed:
        unpack = _COMPRESSED.get(packed.read(2))
        packed.seek(0)
        if unpack is None:
            file = HeldFile(os.dup(packed.fileno()))
        else:
            file = Spool(scratch, str(path))
            with unpack(packed) as stream:
                file.copy(stream)
    files: dict[str, Member] = {}
    links: dict[str, str] = {}
    os.lseek(file.fd, 0, os.SEEK_SET)
    with _TarHeaders(file.fd, closefd=False) as headers, tarfile.open(fileobj=headers, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # which tarfile keeps
            name = posixpath.normpath(member.name)
            if member.issparse():
                yield name, "a sparse file in a tar"
            elif member.isreg():
                files[name] = Member(member.size, partial(file.open, member.offset_data, member.size))
                yield name, files[name]
            elif member.islnk() or member.issym():
                folder = posixpath.dirname(name) if member.issym() else ""
                links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
            else:
                yield name, None if member.isdir() else "no regular file"
    for name, target in links.items():
        yield name, files.get(target, _LINK)


class _TarHeaders(io.FileIO):
    """The file of a tar while its headers are read, which tarfile takes into memory whatever their size."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class HeldFile:
    """An open file, of which parts are read from threads; it is closed with the last of its parts."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def open(self, start: int, size: int) -> BinaryIO:
        """A part as a stream of its own."""
        return io.BufferedReader(_Part(self, start, size))

    def __del__(self) -> None:
        os.close(self.fd)


class _Part(io.RawIOBase):
    def __init__(self, file: HeldFile, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._file.fd, wanted, self._start + self._at)
        if len(data) == 0 < wanted:
            raise EOFError("the archive is cut off")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Spool(HeldFile):
    """A file without a name, which vanishes with the process, for what is not kept in memory.

    It takes at most half of the space that its disk has left.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, where: str) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            super().__init__(os.dup(file.fileno()))
        self._where, self._folder = where, folder or tempfile.gettempdir()
        self.size, self._space = 0, shutil.disk_usage(self._folder).free // 2

    def append(self, data: bytes | np.ndarray) -> int:
        """Returns the place at which the data begin."""
        start, view = self.size, memoryview(data).cast("B")
        self.size += len(view)
        if self.size > self._space:
            what = f"{self._where} unpacks to more than half of the free space at {self._folder}"
            raise DataError(what, "pack to a disk with more space")
        while view:  # the system takes 2 GiB at once
            view = view[os.write(self.fd, view) :]
        return start

    def copy(self, stream: BinaryIO) -> None:
        """Appends all that a stream gives."""
        while block := stream.read(2**20):
            self.append(block)
