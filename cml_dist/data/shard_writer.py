"""Writing a shard set: WebDataset tars, their index and description. The only importer of webdataset."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cml_dist.atomic import write_bytes
from cml_dist.data.base import SPLITS
from cml_dist.data.pixels import Picture
from cml_dist.data.publish import new_folder
from cml_dist.data.shard_format import DATASET_FILE, INDEX_FILE, DatasetInfo, FileInfo, SplitInfo
from cml_dist.errors import DataError


@contextmanager
def new_shard_set(dest: str | os.PathLike[str], **description: Any) -> Iterator[ShardSetWriter]:
    """Yields the writer of a set with this description, which is published whole when the block ends, or not at all.

    Raises:
        DataError: if ``dest`` exists; at the end if there is no image.
        CmlError: if the disk is full or read-only.
    """
    with new_folder(dest) as folder:
        writer = ShardSetWriter(folder, **description)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()


class ShardSetWriter:
    """Writes a shard set into a folder.

    The same calls write the same bytes (for the same package versions). Images of one split and class keep the order
    in which they are added; classes are numbered within their split in the order of their first image. Add split by
    split: a change of split, or a shard of ``shard_size_mib``, begins a new one, which is made in memory.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        image_size: tuple[int, int],
        channels: int,
        source: str = "",
        group_by: str | None = None,
        shard_size_mib: float = 64,
    ) -> None:
        self.name, self.image_size, self.channels, self.source = name, image_size, channels, source
        self.group_by, self._groups = group_by, {}
        self._folder, self._shard_bytes = folder, int(shard_size_mib * 2**20)
        self._split, self._tar, self._buffer = "", None, io.BytesIO()  # the shard in the making
        self._shards: list[FileInfo] = []
        self._classes: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
        self._rows: list[tuple[int, ...]] = []  # split, class, shard, offset, size, group
        self._keys: dict[str, None] = {}
        # Sums of whole numbers, so that mean and deviation do not depend on the order of the images.
        self._count, self._sums = 0, np.zeros((2, channels), dtype=np.int64)

    def add(self, split: str, class_name: str, key: str, picture: Picture, group: str | None = None) -> None:
        """Adds one image, which must have the size and channels of the set; in a set ``group_by`` a pattern, its group.

        Characters of the key that tar or WebDataset cannot carry become ``_``; a key that is taken gets a number.
        """
        number = self._classes[split].setdefault(class_name, len(self._classes[split]))
        data = picture.data
        if split == "train":
            values = picture.pixels.reshape(self.channels, -1).astype(np.int64)
            self._count += values.shape[1]
            self._sums += (values.sum(1), (values * values).sum(1))
        key = _free_key(key, self._keys)
        self._keys[key] = None
        if split != self._split or self._tar.tarstream.offset + len(data) > self._shard_bytes:
            self._close_shard()
            self._begin_shard(split)
        self._tar.write({"__key__": key, "cls": str(number).encode(), picture.ext: data})
        # TarWriter writes the members sorted by extension, and "cls" sorts before both image types.
        offset = self._tar.tarstream.offset - -(-len(data) // 512) * 512
        grouped = self._groups.setdefault(group, len(self._groups))
        self._rows.append((SPLITS.index(split), number, len(self._shards), offset, len(data), grouped))

    def _begin_shard(self, split: str) -> None:
        import webdataset

        self._split, self._buffer = split, io.BytesIO()
        # Fixed owner and time, so that the same images give the same bytes.
        self._tar = webdataset.TarWriter(self._buffer, user="", group="", mtime=0, encoder=False)

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        name = f"{self._split}-{sum(shard.split == self._split for shard in self._shards):06d}.tar"
        images = len(self._rows) - sum(shard.images for shard in self._shards)
        self._shards.append(self._write(name, self._buffer.getvalue(), split=self._split, images=images))

    def close(self) -> None:
        """Ends the shard in the making, which tarfile would complain of otherwise."""
        if self._tar is not None:
            self._tar.close()

    def _write(self, name: str, data: bytes, **more: Any) -> FileInfo:
        write_bytes(self._folder / name, data)
        return FileInfo(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), **more)

    def finish(self) -> None:
        """Writes the last shard, the index and the description."""
        if not self._rows:
            raise DataError(f"no image was added to the set {self.name}", "check the source")
        self._close_shard()
        rows = np.array(self._rows, dtype=np.int64)
        splits = {
            split: SplitInfo(classes=tuple(classes), images=tuple(np.bincount(rows[rows[:, 0] == place, 1]).tolist()))
            for place, (split, classes) in enumerate(self._classes.items())
            if classes
        }
        mean, std = self._statistics()
        info = DatasetInfo(
            name=self.name,
            image_size=self.image_size,
            channels=self.channels,
            source=self.source,
            format_version=1 if self.group_by is None else 2,
            group_by=self.group_by,
            splits=splits,
            mean=mean,
            std=std,
            index=self._write(INDEX_FILE, self._index(rows)),
            shards=tuple(self._shards),
            versions={package: version(package) for package in ("numpy", "pillow", "webdataset")},
        )
        without = {"group_by"} if self.group_by is None else None  # the very bytes of version 1
        self._write(DATASET_FILE, (info.model_dump_json(indent=1, exclude=without) + "\n").encode())

    def _index(self, rows: np.ndarray) -> bytes:
        """The index sorted by split and class, so that each class is one run of numbers."""
        order = np.lexsort((rows[:, 1], rows[:, 0]))
        split, number, shard, offset, size, group = rows[order].T
        buffer = io.BytesIO()
        np.savez(
            buffer,
            split=split.astype(np.uint8),
            class_number=number.astype(np.int32),
            shard=shard.astype(np.int32),
            offset=offset,
            size=size,
            key=np.array(list(self._keys), dtype=np.bytes_)[order],
            **({} if self.group_by is None else {"group": group.astype(np.int32)}),
        )
        return buffer.getvalue()

    def _statistics(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and standard deviation per channel, of pixels in 0..1; None where no training image was seen."""
        count = self._count
        if not count:
            return None, None
        sums, squares = self._sums.tolist()
        # n * sum(x^2) - sum(x)^2 of Python's integers: no overflow, and no cancellation before the last division.
        variances = [(count * square - total * total) / count**2 for total, square in zip(sums, squares, strict=True)]
        mean = tuple(round(total / count / 255, 9) for total in sums)
        return mean, tuple(round(variance**0.5 / 255, 9) for variance in variances)


def _free_key(key: str, taken: dict[str, None]) -> str:
    """The key in characters that tar and WebDataset carry (no dot in the last part), unlike those that are taken."""
    folder, _, last = key.replace("\\", "/").strip("/").rpartition("/")
    folder = re.sub(r"[^A-Za-z0-9_./=+-]", "_", folder)
    last = re.sub(r"[^A-Za-z0-9_=+-]", "_", last) or "_"
    clean = f"{folder}/{last}" if folder else last
    if len(clean) > 90:  # a USTAR name has 100 characters, and an extension and a number must follow
        clean = f"{hashlib.sha256(key.encode()).hexdigest()[:12]}-{last[-60:]}"
    free, number = clean, 2
    while free in taken:
        free, number = f"{clean}-{number}", number + 1
    return free
