"""Answers on the screen: the first of them, and how many there are of each class."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from cml_dist.tools.answers import Answer

_FIRST = 20  # rows
_NAME = 30  # characters of a file's name

Rows = tuple[tuple[str, ...], list[tuple[object, ...]]]
"""Columns and rows of a table."""


class Tally:
    """What is shown of answers that pass by.

    Attributes:
        count: of all pictures; unreadable: of those that could not be read; example: why one of them could not.
    """

    def __init__(self) -> None:
        self.count = self.unreadable = 0
        self.example = ""
        self._first: list[Answer] = []
        self._by_class: dict[object, list[float]] = defaultdict(lambda: [0, 0.0])  # how many, sum of probabilities

    def of(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """The same answers, looked at."""
        for answer in answers:
            self.count += 1
            if len(self._first) < _FIRST:
                self._first.append(answer)
            if answer.error is not None:
                self.unreadable += 1
                self.example = self.example or answer.error
            else:
                row = self._by_class[answer.prediction]
                row[0] += 1
                row[1] += answer.probability
            yield answer

    @property
    def title(self) -> str:
        """Of the first rows."""
        if self.count <= _FIRST:
            return "Predictions"
        return f"The first {_FIRST} of {self.count:,} predictions (all of them: --out predictions.csv)"

    def first_rows(self) -> Rows:
        """The first answers, with names below the folder that they share."""
        folders = [os.path.dirname(answer.image) for answer in self._first]
        shared = os.path.commonpath(folders) if len({os.path.isabs(folder) for folder in folders}) == 1 else ""
        rows = []
        for answer in self._first:
            name = os.path.relpath(answer.image, shared) if shared else answer.image
            if len(name) > _NAME:  # its end, from where a word begins
                end = name[3 - _NAME :]
                name = "..." + (re.search(r"[\s/_-].*", end) or [end])[0]
            found = "not readable" if answer.error is not None else answer.prediction
            rows.append((name, found, None if answer.error is not None else f"{answer.probability:.3f}"))
        return ("image", "prediction", "probability"), rows

    def by_class(self) -> Rows:
        """How many pictures each class has, the most frequent first."""
        counted = sorted(self._by_class.items(), key=lambda item: -item[1][0])
        rows: list[tuple[object, ...]] = [(name, n, f"{total / n:.3f}") for name, (n, total) in counted[:_FIRST]]
        if rest := counted[_FIRST:]:
            n, total = (sum(row[at] for _, row in rest) for at in (0, 1))
            rows.append((f"{len(rest):,} more classes", n, f"{total / n:.3f}"))
        return ("prediction", "pictures", "mean probability"), rows
