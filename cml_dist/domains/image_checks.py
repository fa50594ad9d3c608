"""What must hold of a packed set and the settings before the first episode is made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cml_dist.config.schema import ImageSettings
from cml_dist.domains.sampling import QUARTER_TURNS
from cml_dist.domains.shard_reader import ShardSet
from cml_dist.errors import ConfigError, DataError


def check_splits(shards: ShardSet, settings: ImageSettings, splits: Sequence[str]) -> None:
    """Refuses splits that cannot fill an episode.

    Raises:
        DataError: if a split is missing, has fewer classes than ways, or a class with too few images (named).
        ConfigError: if classes are to be turned and the images are not square.
    """
    height, width = shards.image_size
    if settings.augment.rotate_classes and height != width:
        raise ConfigError(
            f"domain.augment.rotate_classes needs square images, but those of {shards.name} are {height}x{width}",
            "set domain.augment.rotate_classes=false",
        )
    for split in splits:
        _check_classes(shards, settings, split)
        _check_images(shards, settings, split)


def num_classes(shards: ShardSet, settings: ImageSettings, split: str) -> int:
    """Classes that episodes are drawn from: four times those of the training split where classes are turned."""
    turned = split == "train" and settings.augment.rotate_classes
    return len(shards.split_info(split).classes) * (QUARTER_TURNS if turned else 1)


def normalisation(shards: ShardSet, settings: ImageSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel, of pixels in 0..1: as configured, else as measured when the set was packed.

    Raises:
        ConfigError: if they do not fit the channels, or were never measured.
    """
    mean = _statistic("mean", settings.mean, shards.info.mean, shards)
    std = _statistic("std", settings.std, shards.info.std, shards)
    if min(std) <= 0:
        raise ConfigError(f"the measured std of {shards.name} is {std}: a channel is constant", "set domain.std")
    return mean, std


def _statistic(
    name: str, configured: tuple[float, ...] | None, measured: tuple[float, ...] | None, shards: ShardSet
) -> tuple[float, ...]:
    value = configured if configured is not None else measured
    if value is None:
        raise ConfigError(
            f"domain.{name} is not set, and the set {shards.name} has no training split to measure it on",
            f"set domain.{name} to {shards.channels} numbers",
        )
    if len(value) != shards.channels:
        raise ConfigError(
            f"domain.{name} has {len(value)} numbers, but images of {shards.name} have {shards.channels} channels",
            f"give {shards.channels} numbers, or null for the measured ones",
        )
    return tuple(value)


def _check_classes(shards: ShardSet, settings: ImageSettings, split: str) -> None:
    count = num_classes(shards, settings, split)
    if count < settings.ways:
        raise DataError(
            f"domain.ways is {settings.ways}, but split {split!r} of {shards.name} has {count} classes",
            f"lower domain.ways to at most {count}",
        )


def _check_images(shards: ShardSet, settings: ImageSettings, split: str) -> None:
    info = shards.split_info(split)
    sizes = np.array(info.images)
    short = np.flatnonzero(sizes < settings.shots + settings.queries)
    if len(short):
        named = ", ".join(f"{info.classes[c]!r} has {sizes[c]}" for c in short[:3])
        more = f" and {len(short) - 3} more classes have too few" if len(short) > 3 else ""
        raise DataError(
            f"an episode takes {settings.shots} + {settings.queries} images a class (domain.shots + domain.queries), "
            f"but in split {split!r} of {shards.name} class {named}{more}",
            f"lower shots + queries to at most {sizes.min()}, or leave these classes out",
        )
