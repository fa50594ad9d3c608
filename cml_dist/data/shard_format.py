"""What a shard set looks like on the disk.

A shard set is a folder (or URL prefix) with

- ``train-000000.tar`` ...: WebDataset shards of one split each, members ``key.cls`` (class number within the split,
  ASCII) and ``key.png`` or ``key.jpg``;
- ``index.npz``: where each image lies, so that any of them is one ``pread`` away; sorted by split and class;
- ``dataset.json``: names, sizes, counts, checksums, pixel statistics.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from cml_dist.data.base import SPLITS
from cml_dist.errors import DataError

DATASET_FILE = "dataset.json"
INDEX_FILE = "index.npz"
REPAIR = "copy the set again whole, or pack it again (cml-dist data pack); remove a cached copy, and it is fetched anew"


class SplitInfo(BaseModel, frozen=True):
    """Classes of a split in their order, and how many images each has."""

    classes: tuple[str, ...]
    images: tuple[int, ...]


class FileInfo(BaseModel, frozen=True):
    """A file of the set: name within the folder, size in bytes, checksum; for a shard also its split and images."""

    # A set may come from a URL: a name must never lead out of its folder.
    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    size: int
    sha256: str
    split: str = ""
    images: int = 0


class DatasetInfo(BaseModel, frozen=True):
    """The content of ``dataset.json``; mean and std are per channel, of pixels in 0..1 of the training split."""

    format: Literal["cml_dist shard set"] = "cml_dist shard set"
    format_version: Literal[1] = 1
    name: str
    image_size: tuple[int, int]
    channels: Literal[1, 3]
    source: str
    splits: dict[Literal[SPLITS], SplitInfo]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    index: FileInfo
    shards: tuple[FileInfo, ...]
    versions: dict[str, str]


def parse_dataset(data: bytes, where: str) -> DatasetInfo:
    """Reads the bytes of ``dataset.json``; ``where``, its path or URL, is for the error.

    Raises:
        DataError: if it is damaged, of another kind, or of a newer format.
    """
    try:
        return DatasetInfo.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = f"{where} is damaged, or of another version ({place}: {first['msg']})"
        raise DataError(what, f"{REPAIR}, or update cml_dist") from error


def parse_index(data: bytes, info: DatasetInfo, where: str) -> dict[str, np.ndarray]:
    """Reads the bytes of ``index.npz``: shard, offset (bytes), size (bytes) and key of each image.

    Raises:
        DataError: if it is damaged or describes another set.
    """
    try:
        if hashlib.sha256(data).hexdigest() != info.index.sha256:
            raise ValueError("its checksum differs")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            index = {name: stored[name] for name in ("shard", "offset", "size", "key")}
        num_images = sum(sum(split.images) for split in info.splits.values())
        if len(index["shard"]) != num_images or index["shard"].max() >= len(info.shards):
            raise ValueError(f"it does not belong to the {DATASET_FILE} beside it")
    except Exception as error:  # zip and npy readers raise many kinds for damaged files
        raise DataError(f"{where} is damaged ({error})", REPAIR) from error
    return index


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
