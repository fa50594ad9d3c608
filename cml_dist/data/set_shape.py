"""Ways, shots and queries that a configuration leaves open follow from its image set, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable

from cml_dist.config.plan import episode_in_words
from cml_dist.config.schema import ImagesConfig, RunConfig
from cml_dist.config.shape import open_keys, shape_for
from cml_dist.data.glyphs import ensure_glyphs
from cml_dist.data.shards import ShardSet


def settled_shape(config: RunConfig, tell: Callable[[str], object] = lambda line: None) -> RunConfig:
    """The configuration with the shape that all splits of its set can fill, where it leaves that open.

    Args:
        tell: hears what followed, and from what.

    Raises:
        DataError: if the set is missing or damaged.
    """
    if not (left := open_keys(config)):
        return config
    domain = config.domain
    is_packed = isinstance(domain, ImagesConfig)
    shards = ShardSet.open(domain.root, domain.cache) if is_packed else ShardSet.open(ensure_glyphs(domain.root))
    parts = [shards.split_info(split) for split in shards.splits]
    classes = min(len(part.classes) for part in parts)
    images, smallest = min(pair for part in parts for pair in zip(part.images, part.classes, strict=True))
    config = shape_for(config, classes, images)
    tell(
        f"{', '.join(f'domain.{key}' for key in left)}: {episode_in_words(config)}, from the set (the smallest split "
        f"has {classes} classes, the smallest class, {smallest!r}, {images} images)"
    )
    return config
