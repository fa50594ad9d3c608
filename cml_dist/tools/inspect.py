"""``cml-dist data inspect``: what a packed set holds, as rows of a table and as a picture of a few episodes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cml_dist.config.schema import ImagesConfig
from cml_dist.domains.images import ImageDomain
from cml_dist.domains.shard_format import Progress
from cml_dist.domains.shards import ShardSet
from cml_dist.errors import ConfigError
from cml_dist.tools.contact_sheet import draw_contact_sheet


@dataclass(frozen=True)
class SplitRow:
    """One row of the table: a split."""

    split: str
    num_classes: int
    num_images: int
    min_per_class: int
    median_per_class: float
    max_per_class: int
    num_shards: int
    size_mib: float


@dataclass(frozen=True)
class Inspection:
    """What a set holds.

    Attributes:
        name: of the set.
        root: where it is.
        image_size: height and width.
        channels: 1 or 3.
        source: where the images came from.
        mean: per channel, of pixels in 0..1 of the training split.
        std: likewise.
        rows: one per split.
        sheet: the contact sheet, if one was asked for.
        sheet_note: why the sheet shows smaller episodes than asked for, or none; empty where all is as asked.
    """

    name: str
    root: str
    image_size: tuple[int, int]
    channels: int
    source: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    rows: tuple[SplitRow, ...]
    sheet: Path | None
    sheet_note: str


def inspect(
    root: str | os.PathLike[str],
    *,
    sheet: str | os.PathLike[str] | None = None,
    ways: int = 5,
    shots: int = 1,
    queries: int = 5,
    episodes: int = 1,
    seed: int = 0,
    verify: bool = False,
    cache: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Describes a packed set, and draws a few episodes of each split.

    Args:
        root: folder or URL of the set.
        sheet: the PNG to write; None: no picture.
        ways: classes of an episode on the sheet.
        shots: support images a class on the sheet.
        queries: query images a class on the sheet.
        episodes: episodes of each split on the sheet.
        seed: chooses the episodes.
        verify: read all shards and compare their checksums.
        cache: folder for remote sets; None: the user's cache folder.
        progress: called while downloading and verifying.

    Returns:
        The rows of the table, and where the picture is.

    Raises:
        ConfigError: if ways, shots or episodes are below 1.
        DataError: if the set is missing or damaged, or the picture cannot be written.
    """
    for name, value in (("ways", ways), ("shots", shots), ("episodes", episodes)):
        if value < 1:
            raise ConfigError(f"{name} is {value}", f"give 1 or more: --{name} 1")
    shards = ShardSet.open(root, cache=cache, progress=progress)
    if verify:
        shards.verify(progress)
    note = ""
    if sheet is not None:
        ways, shots, queries, note = _what_fits(shards, ways, shots, queries)
        domain = _domain(shards, ways, shots, queries, seed)
        shown = [(split, index) for split in shards.splits for index in range(episodes)]
        draw_contact_sheet(domain, shown, Path(sheet))
    return Inspection(
        name=shards.name,
        root=shards.root,
        image_size=shards.image_size,
        channels=shards.channels,
        source=shards.info.source,
        mean=shards.info.mean,
        std=shards.info.std,
        rows=tuple(_row(shards, split) for split in shards.splits),
        sheet=Path(sheet) if sheet is not None else None,
        sheet_note=note,
    )


def _row(shards: ShardSet, split: str) -> SplitRow:
    sizes = np.array(shards.split_info(split).images)
    return SplitRow(
        split=split,
        num_classes=len(sizes),
        num_images=int(sizes.sum()),
        min_per_class=int(sizes.min()),
        median_per_class=float(np.median(sizes)),
        max_per_class=int(sizes.max()),
        num_shards=sum(shard.split == split for shard in shards.info.shards),
        size_mib=shards.size_on_disk(split) / 2**20,
    )


def _what_fits(shards: ShardSet, ways: int, shots: int, queries: int) -> tuple[int, int, int, str]:
    """A set that is too small for the episodes asked for is shown in smaller ones: to look at it is to find out."""
    least_classes = min(len(shards.split_info(split).classes) for split in shards.splits)
    least_images = min(min(shards.split_info(split).images) for split in shards.splits)
    fitting = min(ways, least_classes), min(shots, least_images), 0
    fitting = fitting[0], fitting[1], min(queries, least_images - fitting[1])
    if fitting == (ways, shots, queries):
        return *fitting, ""
    note = (
        f"the sheet shows {fitting[0]} ways, {fitting[1]} shots and {fitting[2]} queries: the smallest split has "
        f"{least_classes} classes, the smallest class {least_images} images"
    )
    return *fitting, note


def _domain(shards: ShardSet, ways: int, shots: int, queries: int, seed: int) -> ImageDomain:
    """Streams: a few episodes need a few images only. The statistics play no part, for the sheet shows pixels."""
    settings = ImagesConfig.model_construct(
        name="images",
        root=shards.root,
        ways=ways,
        shots=shots,
        queries=queries,
        mean=(0.0,) * shards.channels,
        std=(1.0,) * shards.channels,
        memory_gib=0.0,
    )
    return ImageDomain(shards, settings, train_seed=seed, eval_seed=seed, splits=shards.splits)
