"""Ways, shots and queries that a configuration leaves open follow from its image set, and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable

from cml_dist.config.plan import episode_in_words
from cml_dist.config.schema import ImagesConfig, RunConfig
from cml_dist.config.shape import MOST, open_keys, shape_for, with_shape
from cml_dist.data.glyphs import ensure_glyphs
from cml_dist.data.shards import ShardSet
from cml_dist.errors import DataError


def settled_shape(config: RunConfig, tell: Callable[[str], object] = lambda line: None) -> RunConfig:
    """The configuration with the shape that all splits of its set can fill, where it leaves that open.

    Args:
        tell: hears what followed, and from what.

    Raises:
        DataError: if the set is missing or damaged, or a split has one class alone.
    """
    if not (left := open_keys(config)):
        return config
    domain = config.domain
    is_packed = isinstance(domain, ImagesConfig)
    shards = ShardSet.open(domain.root, domain.cache) if is_packed else ShardSet.open(ensure_glyphs(domain.root))
    parts = [shards.split_info(split) for split in shards.splits]
    classes, split = min((len(part.classes), split) for part, split in zip(parts, shards.splits, strict=True))
    own = classes - domain.distractors
    if own < 2:
        beside = f" beside its {domain.distractors} distractors" * bool(domain.distractors)
        has = f"split {split!r} of {shards.name} has {classes} class{'es' * (classes != 1)}"
        lower = "lower domain.distractors, or " * bool(domain.distractors)
        what = f"{has}, and an episode needs 2 or more{beside}"
        raise DataError(what, f"{lower}pack the pictures again with other --splits")
    images, smallest = min(pair for part in parts for pair in zip(part.images, part.classes, strict=True))

    def fits(shots: int, queries: int) -> bool:
        return not any(shards.short_classes(s, shots, queries + domain.unlabelled) for s in shards.splits)

    config = shape_for(config, own, fits)
    parted = "" if shards.info.group_by is None else ", and no group of images is parted"
    tell(
        f"{', '.join(f'domain.{key}' for key in left)}: {episode_in_words(config)}, from the set (the smallest split "
        f"has {classes} classes, the smallest class, {smallest!r}, {images} images{parted})"
    )
    return config


def known_shape(config: RunConfig) -> RunConfig:
    """The configuration with the shape of its set where that is here; else with the largest that follows from any."""
    return settled_shape(config) if open_keys(config) and is_here(config) else with_shape(config, MOST)


def is_here(config: RunConfig) -> bool:
    """Whether the packed image set of the configuration is a folder of this machine."""
    root = getattr(config.domain, "root", None)
    return config.domain.name != "glyphs" and root is not None and os.path.isdir(root)
