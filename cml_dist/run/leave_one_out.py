"""What accuracy to expect from the examples alone: each is answered by a learner that has not seen it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from cml_dist.errors import DataError
from cml_dist.run.predict import Learner

MOST_PARTS = 20
"""So often it adapts at most."""


def leave_one_out(
    learner: Learner,
    images: Sequence[Any],
    labels: Sequence[Hashable],
    inner_steps: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    unlabelled: Sequence[Any] = (),
) -> int:
    """How many examples are answered right by learners that did not see them.

    Args:
        images, labels, inner_steps, unlabelled: as of :meth:`Learner.adapt`.
        progress: told the parts that are done, and all.

    Raises:
        DataError: a class has one example alone.
    """
    counts = Counter(labels)
    least = min(counts, key=counts.get)
    if counts[least] < 2:
        raise DataError(
            f"class {least} has one example, and to leave it out leaves none", "give two or more examples of each class"
        )
    parts, right = _parts(labels), 0
    for number in range(total := max(parts) + 1):
        kept, held = ([i for i, part in enumerate(parts) if (part == number) is out] for out in (False, True))
        adapted = learner.adapt([images[i] for i in kept], [labels[i] for i in kept], inner_steps, unlabelled)
        predicted = adapted.predict([images[i] for i in held])
        right += sum(label == labels[i] for label, i in zip(predicted, held, strict=True))
        progress(number + 1, total)
    return right


def _parts(labels: Sequence[Hashable]) -> list[int]:
    """The part of each example: those of a class are spread evenly, in an order drawn with seed 0.

    One of each class at a time, and not a single one: else its class had fewer examples than the others, and a learner
    that adapts in few steps takes the rarer class too seldom.
    """
    parts, met = [0] * len(labels), Counter()
    for i in np.random.default_rng(0).permutation(len(labels)).tolist():
        parts[i] = met[labels[i]] % MOST_PARTS
        met[labels[i]] += 1
    return parts
