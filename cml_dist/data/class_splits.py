"""The ways to divide classes into train, val and test, by number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, islice

import numpy as np

ENUMERATED = 1000
"""Up to so many ways are made and shuffled by a fixed seed; of more, as many as are asked for are drawn."""

Division = tuple[tuple[int, ...], ...]


def num_class_splits(num_classes: int, sizes: Sequence[int]) -> int:
    """In how many ways classes can be divided into parts of these sizes; what is left over is in no part."""
    left = [num_classes - sum(sizes[:part]) for part in range(len(sizes))]
    return math.prod(math.comb(max(most, 0), size) for most, size in zip(left, sizes, strict=True))


def class_split(num_classes: int, sizes: Sequence[int], k: int) -> Division:
    """The classes of each part, ascending, by the ``k``-th of all :func:`num_class_splits` ways. Cost: grows with k.

    The order is a fixed, shuffled one: the first so many ways are a fair sample of all.
    """
    if (ways := num_class_splits(num_classes, sizes)) <= ENUMERATED:
        return next(islice(_divisions(range(num_classes), sizes), np.random.default_rng(0).permutation(ways)[k], None))
    rng, found, ends = np.random.default_rng(0), {}, np.cumsum(sizes)
    while len(found) <= k:
        *parts, _ = np.split(rng.permutation(num_classes), ends)
        found[tuple(tuple(sorted(part.tolist())) for part in parts)] = None
    return next(reversed(found))


def _divisions(classes: Sequence[int], sizes: Sequence[int]) -> Iterator[Division]:
    if not sizes:
        yield ()
        return
    for part in combinations(classes, sizes[0]):
        for rest in _divisions([c for c in classes if c not in part], sizes[1:]):
            yield part, *rest
