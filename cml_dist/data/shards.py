"""A packed image set: checked when it is opened, then random access to its images by number."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from cml_dist.data import shard_cache
from cml_dist.data.base import SPLITS, Progress
from cml_dist.data.groups import can_part
from cml_dist.data.pixels import read_pixels
from cml_dist.data.shard_format import (
    DATASET_BYTES,
    DATASET_FILE,
    REPAIR,
    DatasetInfo,
    SplitInfo,
    parse_dataset,
    parse_index,
    sha256_of,
)
from cml_dist.errors import DataError

MAX_OPEN_SHARDS = 256
"""Further shards are opened for each read: the system limits open files."""


class ShardSet:
    """A packed image set; images are numbered through all splits, sorted by split and class.

    Reads are safe from threads and after a fork (``pread`` moves no shared position); the object can be pickled.
    Make one with ``ShardSet.open``.

    Attributes:
        folder: where its files are; ``root``: as given when it was opened.
        splits: those that it has, in the order train, val, test.
    """

    def __init__(self, folder: Path, info: DatasetInfo, index: dict[str, np.ndarray], root: str) -> None:
        self.folder, self.info, self.root = folder, info, root
        self.name, self.image_size, self.channels = info.name, info.image_size, info.channels
        self.splits = tuple(split for split in SPLITS if split in info.splits)
        self._index = index
        self._handles: dict[int, int] = {}

    @classmethod
    def open(
        cls, root: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None, progress: Progress | None = None
    ) -> ShardSet:
        """Opens a set and checks that it is whole (names, sizes, the index; not the content of each shard).

        ``root`` is a folder, or a URL prefix that fsspec opens: see ``shard_cache.local_folder``.

        Raises:
            DataError: naming the file that is missing, incomplete, truncated or damaged.
        """
        root = os.fspath(root)
        folder = shard_cache.local_folder(root, cache, progress)
        file = folder / DATASET_FILE
        try:
            if not file.is_file():
                kind = f"{DATASET_FILE} is missing" if folder.is_dir() else "no such folder"
                raise DataError(
                    f"there is no packed image set at {root} ({kind})",
                    "check the path (domain.root), or make it: cml-dist data pack SOURCE DEST",
                )
            if (size := file.stat().st_size) > DATASET_BYTES:
                raise DataError(f"{file} has {size:,} bytes, which is no description of an image set", REPAIR)
            info = parse_dataset(file.read_bytes(), str(file))
            for part in (*info.shards, info.index):
                file = folder / part.name
                if not file.is_file():
                    raise DataError(f"{file} is missing", REPAIR)
                if (size := file.stat().st_size) != part.size:
                    raise DataError(f"{file} is truncated or damaged: {size} bytes, not {part.size}", REPAIR)
            return cls(folder, info, parse_index(file.read_bytes(), info, str(file)), root)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror or error})", "check its permissions") from error

    def __len__(self) -> int:
        return len(self._index["offset"])

    def split_info(self, split: str) -> SplitInfo:
        """Classes and counts of a split.

        Raises:
            DataError: if the set has no such split.
        """
        if split not in self.info.splits:
            raise DataError(
                f"the set {self.root} has no split {split!r} (it has {', '.join(self.splits)})",
                "pack it with a list of classes for this split",
            )
        return self.info.splits[split]

    def first_image(self, split: str) -> int:
        """The number of the first image of a split; the split's images follow one another, class by class."""
        self.split_info(split)
        return sum(self.num_images(other) for other in self.splits[: self.splits.index(split)])

    def num_images(self, split: str) -> int:
        return sum(self.split_info(split).images)

    def class_groups(self, split: str) -> list[np.ndarray] | None:
        """Of each class the number of each image's group; None: the set was packed without groups."""
        if "group" not in self._index:
            return None
        first, sizes = self.first_image(split), self.split_info(split).images
        return np.split(self._index["group"][first : first + sum(sizes)], np.cumsum(sizes)[:-1])

    def short_classes(self, split: str, shots: int, queries: int) -> list[int]:
        """Numbers of the classes with too few images, or images in too few groups, for an episode of this shape."""
        groups, images = self.class_groups(split), self.split_info(split).images
        if groups is None:
            return [number for number, count in enumerate(images) if count < shots + queries]
        sizes = (np.unique(each, return_counts=True)[1].tolist() for each in groups)
        return [number for number, each in enumerate(sizes) if not can_part(each, shots, queries)]

    def key(self, image: int) -> str:
        """The name of an image, as WebDataset gives it in ``__key__``."""
        return self._index["key"][image].decode(errors="replace")

    def read(self, image: int) -> bytes:
        """The bytes of an image's file.

        Raises:
            DataError: if its shard is missing or has become shorter.
        """
        shard, size, offset = (int(self._index[column][image]) for column in ("shard", "size", "offset"))
        try:
            data = self._pread(shard, size, offset)
        except OSError as error:
            what = f"{self._where(image)} cannot be read ({error.strerror or error})"
            raise DataError(what, REPAIR) from error
        if len(data) != size:
            raise DataError(f"{self._where(image)} is cut off: the shard is truncated", REPAIR)
        return data

    def decode(self, image: int) -> np.ndarray:
        """Pixels uint8 ``[C, H, W]``.

        Raises:
            DataError: naming key and shard, if the image is undecodable or of another size.
        """
        data, shape = self.read(image), (self.channels, *self.image_size)
        try:
            pixels = read_pixels(data, "it", self.channels)
        except DataError as error:
            # The name is made here, and not for each image: this is the inner loop of loading.
            raise DataError(f"{self._where(image)} {error.what.removeprefix('it ')}", error.remedy) from error
        if pixels.shape != shape:
            raise DataError(f"{self._where(image)} has pixels [C, H, W] {pixels.shape}, not {shape}", REPAIR)
        return pixels

    def verify(self, progress: Progress | None = None) -> None:
        """Reads all shards and compares their checksums; ``progress`` is called with bytes done and total.

        Raises:
            DataError: naming the first shard that differs.
        """
        total, done = sum(shard.size for shard in self.info.shards), 0
        for shard in self.info.shards:
            file = self.folder / shard.name
            if sha256_of(file) != shard.sha256:
                raise DataError(f"shard {file} is damaged (its checksum differs)", REPAIR)
            done += shard.size
            if progress is not None:
                progress(done, total, "verifying shards")

    def __del__(self) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _where(self, image: int) -> str:
        return f"image {self.key(image)!r} in shard {self.folder / self.info.shards[self._index['shard'][image]].name}"

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        if (handle := self._handles.get(shard)) is not None:
            return os.pread(handle, size, offset)
        handle = os.open(self.folder / self.info.shards[shard].name, os.O_RDONLY)
        try:
            return os.pread(handle, size, offset)
        finally:
            # Kept for later reads, unless another thread was first or there are very many.
            if len(self._handles) >= MAX_OPEN_SHARDS or self._handles.setdefault(shard, handle) != handle:
                os.close(handle)
