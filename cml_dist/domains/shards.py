"""Shard sets: a packed image set as WebDataset tar shards and an index of members. The only importer of webdataset.

The format is described in ``shard_format.py``; reading is in ``shard_reader.py`` (``ShardSet`` is offered here too).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from cml_dist.domains.base import SPLITS
from cml_dist.domains.pixels import MODES, decode
from cml_dist.domains.publish import FolderInMaking
from cml_dist.domains.shard_format import DATASET_FILE, EXTENSIONS, FORMAT, FORMAT_VERSION, INDEX_FILE
from cml_dist.domains.shard_reader import ShardSet
from cml_dist.errors import DataError

__all__ = ["ShardSet", "ShardSetWriter", "open_by_webdataset"]


class ShardSetWriter:
    """Writes a shard set; a context manager that publishes the whole set at its end, or nothing.

    The same calls write the same bytes (for the same package versions). Images of one split and class keep the order
    in which they are added; classes are numbered within their split in the order of their first image.

    Args:
        dest: the folder to make; must not exist.
        name: of the set, e.g. ``"omniglot"``.
        image_size: pixels a side, or ``(height, width)``.
        channels: 1 (grey) or 3 (RGB).
        source: where the images come from, for the record.
        shard_size_mib: size at which a new shard is begun, MiB.

    Raises:
        DataError: if ``dest`` exists; on exit if there is no image; if the disk is full.
    """

    def __init__(
        self,
        dest: str | os.PathLike[str],
        *,
        name: str,
        image_size: int | tuple[int, int],
        channels: int,
        source: str = "",
        shard_size_mib: float = 64,
    ) -> None:
        if channels not in MODES:
            raise DataError(f"channels is {channels}", f"use one of {sorted(MODES)}")
        self.name = name
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.channels = channels
        self.source = source
        self._shard_bytes = int(shard_size_mib * 2**20)
        self._folder = FolderInMaking(dest)
        self._open: dict[str, _ShardFile] = {}
        self._shards: list[dict[str, Any]] = []
        self._classes: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
        self._rows: list[tuple[int, int, int, int, int]] = []  # split, class, shard, offset, size
        self._keys: list[str] = []
        self._known_keys: set[str] = set()
        self._moments = _Moments(channels)

    def __enter__(self) -> ShardSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with self._writing():
                    self._finish()
        except BaseException:
            self._discard()
            raise
        if error is not None:
            self._discard()

    def _discard(self) -> None:
        for shard in self._open.values():
            shard.abandon()
        self._folder.discard()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a failure to write into an error that says so."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot write {self._folder.dest} ({error.strerror or error})",
                "free space or choose another destination; nothing was left half written",
            ) from error

    def add(
        self, split: str, class_name: str, key: str, data: bytes, ext: str, pixels: np.ndarray | None = None
    ) -> None:
        """Adds one image.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            class_name: the name of its class; a class belongs to one split.
            key: the name of the image; characters that tar or WebDataset cannot carry become ``_``, and a key that is
                taken gets a number.
            data: the bytes of the file, stored as they are.
            ext: ``"png"`` or ``"jpg"``.
            pixels: ``data`` decoded, uint8 ``[C, H, W]``, if the caller has it; else it is decoded here.

        Raises:
            DataError: if the image is unreadable or of another size or mode, or the class lies in another split.
        """
        self._check(split, class_name, ext)
        if pixels is None:
            pixels = decode(data, f"image {key!r} of class {class_name!r}", self.image_size, self.channels)
        if split == "train":
            self._moments.add(pixels)
        number = self._classes[split].setdefault(class_name, len(self._classes[split]))
        key = _free_key(key, self._known_keys)
        with self._writing():
            shard = self._shard(split, len(data))
            offset = shard.write(key, data, ext, number)
        self._rows.append((SPLITS.index(split), number, shard.number, offset, len(data)))
        self._keys.append(key)

    def _check(self, split: str, class_name: str, ext: str) -> None:
        if split not in SPLITS:
            raise DataError(f"split is {split!r}", f"use one of {', '.join(SPLITS)}")
        if ext not in EXTENSIONS:
            raise DataError(f"file type is {ext!r}", f"use one of {', '.join(EXTENSIONS)}")
        for other in SPLITS:
            if other != split and class_name in self._classes[other]:
                raise DataError(
                    f"class {class_name!r} lies in the splits {other!r} and {split!r}", "give each class to one split"
                )

    def _shard(self, split: str, num_bytes: int) -> _ShardFile:
        """The open shard of the split; a new one where this image would make it too large."""
        shard = self._open.get(split)
        if shard is not None and shard.size + num_bytes > self._shard_bytes:
            self._close_shard(split)
            shard = None
        if shard is None:
            count = sum(entry["split"] == split for entry in self._shards)
            number = len(self._shards)
            name = f"{split}-{count:06d}.tar"
            self._shards.append({"name": name, "split": split})
            shard = self._open[split] = _ShardFile(self._folder.path / name, number)
        return shard

    def _close_shard(self, split: str) -> None:
        shard = self._open[split]
        self._shards[shard.number].update(shard.close())
        del self._open[split]

    def _finish(self) -> None:
        if not self._rows:
            raise DataError(f"no image was added to {self._folder.dest}", "check the source")
        for split in list(self._open):
            self._close_shard(split)
        index = self._index_bytes()
        (self._folder.path / INDEX_FILE).write_bytes(index)
        (self._folder.path / DATASET_FILE).write_bytes(_json_bytes(self._description(index)))
        self._folder.publish()

    def _index_bytes(self) -> bytes:
        """The index sorted by split and class, so that each class is one run of numbers."""
        rows = np.array(self._rows, dtype=np.int64)
        order = np.lexsort((rows[:, 1], rows[:, 0]))
        split, number, shard, offset, size = rows[order].T
        buffer = io.BytesIO()
        np.savez(
            buffer,
            split=split.astype(np.uint8),
            class_number=number.astype(np.int32),
            shard=shard.astype(np.int32),
            offset=offset,
            size=size,
            key=np.array(self._keys, dtype=np.bytes_)[order],
        )
        return buffer.getvalue()

    def _description(self, index: bytes) -> dict[str, Any]:
        rows = np.array(self._rows, dtype=np.int64)
        splits = {}
        for position, split in enumerate(SPLITS):
            classes = list(self._classes[split])
            if classes:
                counts = np.bincount(rows[rows[:, 0] == position, 1], minlength=len(classes))
                splits[split] = {"classes": classes, "images": counts.tolist()}
        mean, std = self._moments.result()
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "image_size": list(self.image_size),
            "channels": self.channels,
            "source": self.source,
            "splits": splits,
            "mean": mean,
            "std": std,
            "index": {"name": INDEX_FILE, "size": len(index), "sha256": hashlib.sha256(index).hexdigest()},
            "shards": self._shards,
            "versions": {package: version(package) for package in ("numpy", "pillow", "webdataset")},
        }


class _ShardFile:
    """One tar in the making: WebDataset's TarWriter over a file that counts and hashes what passes."""

    def __init__(self, path: Path, number: int) -> None:
        import webdataset

        self.number = number
        self._images = 0
        self._file = _HashingFile(path)
        # Fixed owner and time, so that the same images give the same bytes.
        self._tar = webdataset.TarWriter(self._file, user="", group="", mtime=0, encoder=False)

    @property
    def size(self) -> int:
        return self._tar.tarstream.offset

    def write(self, key: str, data: bytes, ext: str, class_number: int) -> int:
        """Writes a sample and returns the offset of the image's bytes in the tar."""
        self._tar.write({"__key__": key, "cls": str(class_number).encode(), ext: data})
        self._images += 1
        # TarWriter writes the members sorted by extension, and "cls" sorts before both image types.
        return self._tar.tarstream.offset - -(-len(data) // 512) * 512

    def close(self) -> dict[str, Any]:
        self._tar.close()
        self._file.close()
        return {"images": self._images, "size": self._file.size, "sha256": self._file.digest.hexdigest()}

    def abandon(self) -> None:
        """Closes without caring whether it can be written; both parts, or the other is closed when collected."""
        for part in (self._tar, self._file):
            with suppress(OSError, ValueError):
                part.close()


class _HashingFile:
    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by its owner)
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


class _Moments:
    """Exact integer sums of pixels, so that mean and deviation do not depend on the order of the images."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sum = [0] * channels
        self._sum_of_squares = [0] * channels

    def add(self, pixels: np.ndarray) -> None:
        values = pixels.reshape(len(pixels), -1).astype(np.int64)
        self._count += values.shape[1]
        for channel, (first, second) in enumerate(zip(values.sum(1), (values * values).sum(1), strict=True)):
            self._sum[channel] += int(first)
            self._sum_of_squares[channel] += int(second)

    def result(self) -> tuple[list[float] | None, list[float] | None]:
        """Mean and standard deviation per channel, of pixels in 0..1; None where no training image was seen."""
        if not self._count:
            return None, None
        mean = [total / self._count for total in self._sum]
        # n * sum(x^2) - sum(x)^2 stays an integer: no cancellation before the last division.
        variance = [
            (self._count * squares - total * total) / self._count**2
            for total, squares in zip(self._sum, self._sum_of_squares, strict=True)
        ]
        return [round(m / 255, 9) for m in mean], [round(v**0.5 / 255, 9) for v in variance]


def _free_key(key: str, taken: set[str]) -> str:
    """The key in characters that tar and WebDataset carry (no dot in the last part), unique; noted in ``taken``."""
    folder, _, last = key.replace("\\", "/").strip("/").rpartition("/")
    folder = re.sub(r"[^A-Za-z0-9_./=+-]", "_", folder)
    last = re.sub(r"[^A-Za-z0-9_=+-]", "_", last) or "_"
    clean = f"{folder}/{last}" if folder else last
    if len(clean) > 90:  # a USTAR name has 100 characters, and an extension and a number must follow
        clean = f"{hashlib.sha256(key.encode()).hexdigest()[:12]}-{last[-60:]}"
    free, number = clean, 2
    while free in taken:
        free, number = f"{clean}-{number}", number + 1
    taken.add(free)
    return free


def open_by_webdataset(url: str) -> BinaryIO:
    """A stream of bytes from any URL that webdataset opens, e.g. http, gs or a ``pipe:`` command."""
    import webdataset

    return webdataset.gopen(url, "rb")


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
