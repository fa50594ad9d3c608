"""Reading a shard set: checks before training, then random access to images by number."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from cml_dist.domains import pixels, shard_cache
from cml_dist.domains.base import SPLITS
from cml_dist.domains.shard_format import (
    DATASET_FILE,
    DatasetInfo,
    FileInfo,
    Progress,
    SplitInfo,
    parse_dataset,
    parse_index,
)
from cml_dist.errors import DataError

MAX_OPEN_SHARDS = 256
"""With more shards than this, a shard is opened for each read: the system limits open files."""

_READ_BYTES = 2**20


class ShardSet:
    """A packed image set; images are numbered through all splits, sorted by split and class.

    Reads are safe from threads and after a fork (``pread`` moves no shared position); the object can be pickled.
    Make one with ``ShardSet.open``.
    """

    def __init__(self, folder: Path, info: DatasetInfo, index: dict[str, np.ndarray], root: str) -> None:
        self.folder = folder
        self.info = info
        self.root = root
        self._shard, self._offset, self._size = index["shard"], index["offset"], index["size"]
        self._key = index["key"]
        self._handles: dict[int, int] = {}

    @classmethod
    def open(
        cls, root: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None, progress: Progress | None = None
    ) -> ShardSet:
        """Opens a set and checks that it is whole (names, sizes, the index; not the content of each shard).

        Args:
            root: a folder, or a URL prefix that fsspec or webdataset opens; a remote set is downloaded once.
            cache: folder for remote sets; None: the user's cache folder.
            progress: called with bytes done and total while a remote set is downloaded.

        Raises:
            DataError: naming the file that is missing, incomplete, truncated or damaged.
        """
        root = os.fspath(root)
        folder = shard_cache.local_folder(root, cache, progress)
        info = parse_dataset(_read_part(folder, DATASET_FILE, root), str(folder / DATASET_FILE))
        for file in (info.index, *info.shards):
            _check_size(folder, file, root)
        data = (folder / info.index.name).read_bytes()
        if hashlib.sha256(data).hexdigest() != info.index.sha256:
            raise DataError(f"{folder / info.index.name} is damaged (its checksum differs)", _remedy(root, folder))
        return cls(folder, info, parse_index(data, info, str(folder / info.index.name)), root)

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def image_size(self) -> tuple[int, int]:
        return self.info.image_size

    @property
    def channels(self) -> int:
        return self.info.channels

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the set has, in the order train, val, test."""
        return tuple(split for split in SPLITS if split in self.info.splits)

    def __len__(self) -> int:
        return len(self._offset)

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
        before = SPLITS[: SPLITS.index(split)]
        return sum(sum(self.info.splits[other].images) for other in before if other in self.info.splits)

    def num_images(self, split: str) -> int:
        return sum(self.split_info(split).images)

    def size_on_disk(self, split: str) -> int:
        """Bytes of the split's shards."""
        return sum(shard.size for shard in self.info.shards if shard.split == split)

    def key(self, image: int) -> str:
        """The name of an image, as WebDataset gives it in ``__key__``."""
        return self._key[image].decode()

    def where(self, image: int) -> str:
        """The name of an image and of its shard, for errors."""
        return f"image {self.key(image)!r} in shard {self.folder / self._shard_info(image).name}"

    def read(self, image: int) -> bytes:
        """The bytes of an image's file.

        Raises:
            DataError: if its shard is missing or has become shorter.
        """
        size, offset = int(self._size[image]), int(self._offset[image])
        try:
            data = self._pread(int(self._shard[image]), size, offset)
        except OSError as error:
            raise DataError(
                f"{self.where(image)} cannot be read ({error.strerror or error})", _remedy(self.root, self.folder)
            ) from error
        if len(data) != size:
            raise DataError(f"{self.where(image)} is cut off: the shard is truncated", _remedy(self.root, self.folder))
        return data

    def decode(self, image: int) -> np.ndarray:
        """Pixels uint8 ``[C, H, W]``.

        Raises:
            DataError: naming key and shard, if the image is undecodable or of another size or mode.
        """
        data = self.read(image)
        try:
            return pixels.decode(data, "image", self.image_size, self.channels)
        except DataError as error:
            # The name is made here, and not for each image: this is the inner loop of loading.
            what = error.what.removeprefix("image ")
            raise DataError(f"{self.where(image)} {what}", error.remedy) from error

    def verify(self, progress: Progress | None = None) -> None:
        """Reads all shards and compares their checksums.

        Args:
            progress: called with bytes done and total.

        Raises:
            DataError: naming the first shard that differs.
        """
        total, done = sum(shard.size for shard in self.info.shards), 0
        for shard in self.info.shards:
            digest = hashlib.sha256()
            with open(self.folder / shard.name, "rb") as file:
                while block := file.read(_READ_BYTES):
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, total, f"verifying {shard.name}")
            if digest.hexdigest() != shard.sha256:
                what = f"shard {self.folder / shard.name} is damaged (its checksum differs)"
                raise DataError(what, _remedy(self.root, self.folder))

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _shard_info(self, image: int) -> FileInfo:
        return self.info.shards[int(self._shard[image])]

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        handle = self._handles.get(shard)
        if handle is None:
            opened = os.open(self.folder / self.info.shards[shard].name, os.O_RDONLY)
            if len(self.info.shards) > MAX_OPEN_SHARDS:
                try:
                    return os.pread(opened, size, offset)
                finally:
                    os.close(opened)
            handle = self._handles.setdefault(shard, opened)  # one step under the interpreter lock
            if handle != opened:  # another thread was first
                os.close(opened)
        return os.pread(handle, size, offset)


def _read_part(folder: Path, name: str, root: str) -> bytes:
    if not folder.is_dir():
        raise DataError(
            f"there is no packed image set at {root} ({'not a folder' if folder.exists() else 'no such folder'})",
            "check the path (domain.root), or make it: cml-dist data pack SOURCE DEST",
        )
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{root} is no whole packed image set: {name} is missing",
            "pack the images first: cml-dist data pack SOURCE DEST",
        ) from error
    except OSError as error:
        what = f"{folder / name} cannot be read ({error.strerror or error})"
        raise DataError(what, "check its permissions") from error


def _check_size(folder: Path, file: FileInfo, root: str) -> None:
    try:
        size = (folder / file.name).stat().st_size
    except OSError as error:
        raise DataError(f"{folder / file.name} is missing", _remedy(root, folder)) from error
    if size != file.size:
        kind = "truncated" if size < file.size else "damaged"
        raise DataError(f"{folder / file.name} is {kind}: {size} bytes, not {file.size}", _remedy(root, folder))


def _remedy(root: str, folder: Path) -> str:
    if shard_cache.is_remote(root):
        return f"remove {folder}, so that it is downloaded again"
    return f"copy {root} again whole, or pack it again (cml-dist data pack)"
