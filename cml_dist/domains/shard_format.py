"""What a shard set looks like on the disk.

A shard set is a folder (or URL prefix) with

- ``train-000000.tar`` ...: WebDataset shards of one split each, members ``key.cls`` (class number within the split,
  ASCII) and ``key.png`` or ``key.jpg``;
- ``index.npz``: where each image lies, so that any of them is one ``pread`` away; sorted by split and class;
- ``dataset.json``: names, sizes, counts, checksums, pixel statistics.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cml_dist.domains.base import SPLITS
from cml_dist.domains.pixels import MODES
from cml_dist.errors import DataError

FORMAT = "cml_dist shard set"
FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.npz"
EXTENSIONS = ("png", "jpg")

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``: called as work goes on."""


@dataclass(frozen=True)
class SplitInfo:
    """Classes of a split in their order, and how many images each has."""

    classes: tuple[str, ...]
    images: tuple[int, ...]


@dataclass(frozen=True)
class FileInfo:
    """A file of the set: name within the folder, size in bytes, checksum; for a shard also its split and images."""

    name: str
    size: int
    sha256: str
    split: str = ""
    images: int = 0


@dataclass(frozen=True)
class DatasetInfo:
    """The content of ``dataset.json``; mean and std are per channel, of pixels in 0..1 of the training split."""

    name: str
    image_size: tuple[int, int]
    channels: int
    source: str
    splits: Mapping[str, SplitInfo]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    index: FileInfo
    shards: tuple[FileInfo, ...]
    versions: Mapping[str, str]

    @property
    def num_images(self) -> int:
        return sum(sum(split.images) for split in self.splits.values())


def parse_dataset(data: bytes, where: str) -> DatasetInfo:
    """Reads ``dataset.json``.

    Args:
        data: its bytes.
        where: its path or URL, for the error.

    Raises:
        DataError: if it is damaged, of another kind, or of a newer format.
    """
    try:
        content = json.loads(data)
        found = content["format"], content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is damaged or is no description of a shard set", _PACK_AGAIN) from error
    if found != (FORMAT, FORMAT_VERSION):
        raise DataError(
            f"{where} has format {found[0]!r} version {found[1]}, not {FORMAT!r} version {FORMAT_VERSION}",
            "pack the set again with this version, or update cml_dist",
        )
    try:
        info = _build(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is damaged ({type(error).__name__}: {error})", _PACK_AGAIN) from error
    return info


def parse_index(data: bytes, info: DatasetInfo, where: str) -> dict[str, np.ndarray]:
    """Reads ``index.npz`` and checks it against the description.

    Returns:
        Arrays of one entry per image: split, class_number, shard, offset (bytes), size (bytes), key.

    Raises:
        DataError: if it is damaged or describes other shards.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            index = {name: stored[name] for name in ("split", "class_number", "shard", "offset", "size", "key")}
    except Exception as error:  # zip and npy readers raise many kinds for damaged files
        raise DataError(f"{where} is damaged ({error})", _PACK_AGAIN) from error
    if not _index_fits(index, info):
        raise DataError(f"{where} does not belong to the {DATASET_FILE} beside it", _PACK_AGAIN)
    return index


_PACK_AGAIN = "pack the set again (cml-dist data pack SOURCE DEST), or copy it again whole"


def _build(content: dict[str, Any]) -> DatasetInfo:
    height, width = content["image_size"]
    splits = {
        split: SplitInfo(tuple(entry["classes"]), tuple(int(count) for count in entry["images"]))
        for split, entry in content["splits"].items()
    }
    mean, std = content["mean"], content["std"]
    info = DatasetInfo(
        name=str(content["name"]),
        image_size=(int(height), int(width)),
        channels=int(content["channels"]),
        source=str(content["source"]),
        splits=splits,
        mean=None if mean is None else tuple(map(float, mean)),
        std=None if std is None else tuple(map(float, std)),
        index=FileInfo(**content["index"]),
        shards=tuple(FileInfo(**entry) for entry in content["shards"]),
        versions=dict(content["versions"]),
    )
    _check_build(info)
    return info


def _check_build(info: DatasetInfo) -> None:
    if info.channels not in MODES:
        raise ValueError(f"channels is {info.channels}")
    for split, entry in info.splits.items():
        if split not in SPLITS or len(entry.classes) != len(entry.images):
            raise ValueError(f"split {split!r}")
    for file in (info.index, *info.shards):
        # A set may come from a URL: a name must never lead out of its folder.
        if "/" in file.name or file.name in ("", ".", "..") or not isinstance(file.size, int):
            raise ValueError(f"file {file.name!r}")


def _index_fits(index: dict[str, np.ndarray], info: DatasetInfo) -> bool:
    expected_split = np.concatenate(
        [np.full(sum(info.splits[s].images), i) for i, s in enumerate(SPLITS) if s in info.splits] or [np.zeros(0)]
    )
    expected_class = np.concatenate(
        [np.repeat(np.arange(len(e.images)), e.images) for s in SPLITS if (e := info.splits.get(s))] or [np.zeros(0)]
    )
    if any(len(column) != info.num_images for column in index.values()):
        return False
    if not info.num_images or not (0 <= index["shard"].min() and index["shard"].max() < len(info.shards)):
        return False
    ends = np.array([shard.size for shard in info.shards])[index["shard"]]
    return bool(
        np.array_equal(index["split"], expected_split)
        and np.array_equal(index["class_number"], expected_class)
        and (index["offset"] >= 0).all()
        and (index["size"] >= 0).all()
        and (index["offset"] + index["size"] <= ends).all()
    )
