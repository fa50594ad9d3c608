"""Pictures of one group (a video, a patient) stand on one side of an episode: in its support set, or its query set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cml_dist.errors import DataError

MOST_TRIES = 1000
"""Draws of classes for an episode, of which groups that they share may spoil some."""


def can_part(sizes: Iterable[int], shots: int, queries: int) -> bool:
    """Whether groups of so many pictures can be parted so that one side has ``shots``, the other one ``queries``."""
    sizes = list(sizes)
    return _reaches(_sums(sizes)[0], shots, sum(sizes) - queries)


def draw_parted(
    rng: np.random.Generator, groups: Sequence[np.ndarray], ways: int, shots: int, queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws class numbers ``[ways]`` and image numbers in their class ``[ways, shots + queries]``, both int64.

    No group has images among the shots of one class and among the queries of any. Each group takes a side with
    probability 1/2, as far as all sides can be filled; then images are drawn without replacement. What is drawn is the
    same for all ``queries`` that leave these sides as they are.

    Args:
        groups: of each class the group of each image, whole numbers.

    Raises:
        DataError: the classes share so many groups that none of many draws can be parted.
    """
    for _ in range(MOST_TRIES):
        classes, sides = rng.choice(len(groups), size=ways, replace=False), {}
        rows = [_draw_class(rng, groups[number], sides, shots, queries) for number in classes]
        if all(row is not None for row in rows):
            return classes.astype(np.int64), np.stack(rows).astype(np.int64)
    raise DataError(
        f"the classes share so many groups that no {ways} of them were found with {shots} + {queries} images each and "
        "no group in both support and query set",
        "lower domain.ways, shots or queries, or pack with groups that lie in one class each (cml-dist data pack "
        "--group-by)",
    )


def _draw_class(
    rng: np.random.Generator, groups: np.ndarray, sides: dict[int, bool], shots: int, queries: int
) -> np.ndarray | None:
    """Image numbers of one class; ``sides``: whether a group is on the support side, to which its own are added.

    None: the sides that are taken leave no way.
    """
    names, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order, chances = rng.permutation(len(groups)), rng.random(len(names))
    free = np.array([name not in sides for name in names.tolist()])
    taken = sum(int(size) for name, size in zip(names.tolist(), sizes, strict=True) if sides.get(name))
    chosen = _part(sizes[free], chances[free], shots - taken, len(groups) - queries - taken)
    if chosen is None:
        return None
    sides |= zip(names[free].tolist(), chosen.tolist(), strict=True)
    support = np.array([sides[name] for name in names.tolist()])[member[order]]
    return np.concatenate([order[support][:shots], order[~support][:queries]])


def _part(sizes: np.ndarray, chances: np.ndarray, least: int, most: int) -> np.ndarray | None:
    """Which groups bool ``[N]`` make up ``least`` to ``most`` pictures: those of a chance below 1/2, as far as they do.

    None: there is no such choice.
    """
    chosen = chances < 0.5
    if least <= sizes[chosen].sum() <= most:
        return chosen
    order = np.argsort(chances)
    left = _sums(sizes[order].tolist())
    if not _reaches(left[0], least, most):
        return None
    for place, group in enumerate(order):
        size = int(sizes[group])
        with_it, without = (_reaches(left[place + 1], least - n, most - n) for n in (size, 0))
        chosen[group] = with_it and (chosen[group] or not without)
        if chosen[group]:
            least, most = least - size, most - size
    return chosen


def _sums(sizes: Sequence[int]) -> list[int]:
    """For each place: bit n is set where some of the sizes from there on add up to n."""
    sums = [1]
    for size in reversed(sizes):
        sums.append(sums[-1] | sums[-1] << size)
    return sums[::-1]


def _reaches(sums: int, least: int, most: int) -> bool:
    """Whether a bit from ``least`` to ``most`` is set."""
    least = max(0, least)
    return most >= least and bool(sums >> least & ((1 << most - least + 1) - 1))
