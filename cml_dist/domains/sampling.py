"""Which classes and images an episode is made of: drawn without replacement from the episode's own generator."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

QUARTER_TURNS = 4


class Draw(NamedTuple):
    """The choice of an episode.

    Attributes:
        classes: class numbers ``[ways]`` int64, all different.
        images: image numbers within their class ``[ways, shots + queries]`` int64, different within each row.
    """

    classes: np.ndarray
    images: np.ndarray


def draw(rng: np.random.Generator, class_sizes: np.ndarray, ways: int, shots: int, queries: int) -> Draw:
    """Draws classes, and images of each, without replacement.

    Args:
        rng: the episode's generator (``domains.base.episode_rng``).
        class_sizes: images of each class, ``[num_classes]``; each at least ``shots + queries``.
        ways: classes to draw.
        shots: support images a class: the first columns of the result.
        queries: query images a class: the other columns.
    """
    classes = rng.choice(len(class_sizes), size=ways, replace=False)
    images = np.stack([rng.choice(int(class_sizes[c]), size=shots + queries, replace=False) for c in classes])
    return Draw(classes.astype(np.int64), images.astype(np.int64))


def turned_classes(class_sizes: np.ndarray) -> np.ndarray:
    """Sizes of the class list in which each class occurs in four orientations.

    Class ``c`` turned by ``t`` quarter turns has the number ``c + t * num_classes`` (see ``split_turns``).
    """
    return np.tile(class_sizes, QUARTER_TURNS)


def split_turns(classes: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in the list of ``turned_classes`` as (class, quarter turns)."""
    return classes % num_classes, classes // num_classes
