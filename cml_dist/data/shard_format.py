"""What a shard set looks like on the disk.

A shard set is a folder (or URL prefix) with

- ``train-000000.tar`` ...: WebDataset shards of one split each, members ``key.cls`` (class number within the split,
  ASCII) and ``key.png`` or ``key.jpg``;
- ``index.npz``: where each image lies, so that any of them is one ``pread`` away; sorted by split and class; in a set
  with groups also the number of each image's group;
- ``dataset.json``: names, sizes, counts, checksums, pixel statistics.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cml_dist.data.base import SPLITS
from cml_dist.errors import DataError

DATASET_FILE = "dataset.json"
INDEX_FILE = "index.npz"
DATASET_BYTES = 2**26
"""Most that ``dataset.json`` may have: of a million classes it has 30 MB."""
IMAGE_BYTES = 2**28
"""Most that the file of one packed image may have."""
REPAIR = "copy the set again whole, or pack it again (cml-dist data pack); remove a cached copy, and it is fetched anew"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1, lt=2**53)]


class SplitInfo(_Strict):
    """Classes of a split in their order, and how many images each has."""

    classes: tuple[str, ...] = Field(min_length=1)
    images: tuple[Count, ...]

    @model_validator(mode="after")
    def _agrees(self) -> SplitInfo:
        if len(self.classes) != len(self.images):
            raise ValueError(f"{len(self.classes)} classes have {len(self.images)} counts")
        return self


class FileInfo(_Strict):
    """A file of the set: name within the folder, size in bytes, checksum; for a shard also its split and images."""

    # A set may come from anybody: a name never leads out of its folder, and no tool takes it for an option or pattern.
    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=200)
    size: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    split: str = ""
    images: int = 0


class DatasetInfo(_Strict):
    """The content of ``dataset.json``; mean and std are per channel, of pixels in 0..1 of the training split.

    Version 2 has ``group_by``, the pattern by which images were grouped: earlier releases would part groups.
    """

    format: Literal["cml_dist shard set"] = "cml_dist shard set"
    format_version: Literal[1, 2] = 1
    name: str
    image_size: tuple[Annotated[int, Field(ge=1, le=2**15)], Annotated[int, Field(ge=1, le=2**15)]]
    channels: Literal[1, 3]
    source: str
    group_by: str | None = None
    splits: dict[Literal[SPLITS], SplitInfo] = Field(min_length=1)
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    index: FileInfo
    shards: tuple[FileInfo, ...]
    versions: dict[str, str]

    @property
    def num_images(self) -> int:
        return sum(sum(split.images) for split in self.splits.values())

    @property
    def index_bytes(self) -> int:
        """Most that the index may have, packed or not: a row has about 125 bytes."""
        return 512 * self.num_images + 2**16

    @model_validator(mode="after")
    def _agrees(self) -> DatasetInfo:
        if (self.format_version == 2) != (self.group_by is not None):
            raise ValueError("format version 2 has groups, and version 1 has none")
        names = [DATASET_FILE, self.index.name, *(shard.name for shard in self.shards)]
        if len(set(names)) < len(names):
            raise ValueError("two files have one name")
        if self.num_images * 2048 > sum(shard.size for shard in self.shards):  # two members of a tar each
            raise ValueError("the shards are too small for so many images")
        if self.index.size > self.index_bytes:
            raise ValueError("the index is too large for so few images")
        return self


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
        what = f"{where} is damaged, or of another version ({f'{place}: ' if place else ''}{first['msg']})"
        raise DataError(what, f"{REPAIR}, or update cml_dist") from error


def parse_index(data: bytes, info: DatasetInfo, where: str) -> dict[str, np.ndarray]:
    """Reads the bytes of ``index.npz``: shard, offset (bytes), size (bytes) and key of each image, and its group.

    Raises:
        DataError: if it is damaged or describes another set.
    """
    try:
        if hashlib.sha256(data).hexdigest() != info.index.sha256:
            raise ValueError("its checksum differs")
        with zipfile.ZipFile(io.BytesIO(data)) as file:  # before anything is unpacked
            if sum(member.file_size for member in file.infolist()) > info.index_bytes:
                raise ValueError("it unpacks to more than an index of so many images")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            grouped = () if info.group_by is None else ("group",)
            index = {name: stored[name] for name in ("shard", "offset", "size", "key", *grouped)}
        shard, offset, size = (index[name] for name in ("shard", "offset", "size"))
        if any(column.shape != (info.num_images,) for column in index.values()):
            raise ValueError(f"it does not belong to the {DATASET_FILE} beside it")
        if "".join(column.dtype.kind for column in index.values()) != "iiiS" + "i" * len(grouped):
            raise ValueError("its columns are of other types")
        if shard.min() < 0 or shard.max() >= len(info.shards) or offset.min() < 0 or not 0 < size.min():
            raise ValueError(f"it does not belong to the {DATASET_FILE} beside it")
        ends = np.array([file.size for file in info.shards])[shard]
        if size.max() > IMAGE_BYTES or (size > ends).any() or (offset > ends - size).any():
            raise ValueError("an image lies outside of its shard")
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
