"""Answers as files: a table (.csv), records (.jsonl), or a contact sheet to look at (.html)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

from cml_dist.atomic import atomic_file, refused
from cml_dist.telemetry.text import line
from cml_dist.tools.answers import Answer
from cml_dist.tools.page import page_template

FIELDS = ("image", "prediction", "probability", "error")
"""Of each row, before the probabilities of the classes."""

CONTACT_SHEET = ".html"


def write_answers(path: Path, title: str, classes: Sequence[object], answers: Iterable[Answer]) -> None:
    """Write a file of the kind that its suffix means, whole or not at all.

    Raises:
        CmlError: the file system refused.
    """
    try:
        with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            WRITERS[path.suffix.lower()](file, title, classes, answers)
    except OSError as error:
        raise refused(path, error) from error


def _write_csv(file: TextIO, title: str, classes: Sequence[object], answers: Iterable[Answer]) -> None:
    writer = csv.writer(file)
    # A class that is called like a field keeps a column of its own.
    names = [f"{name} (class)" if name in FIELDS else line(name) for name in classes]
    writer.writerow([*FIELDS, *names])
    for answer in answers:
        values = answer.probabilities or [None] * len(classes)
        writer.writerow([*(getattr(answer, field) for field in FIELDS), *values])


def _write_jsonl(file: TextIO, title: str, classes: Sequence[object], answers: Iterable[Answer]) -> None:
    for answer in answers:
        row = {field: getattr(answer, field) for field in FIELDS}
        by_class = dict(zip(map(str, classes), answer.probabilities, strict=True)) if answer.probabilities else None
        file.write(json.dumps({**row, "probabilities": by_class}, ensure_ascii=False) + "\n")


def _write_sheet(file: TextIO, title: str, classes: Sequence[object], answers: Iterable[Answer]) -> None:
    found = sorted(answers, key=lambda answer: (answer.error is not None, -(answer.probability or 0.0)))
    readable = [answer for answer in found if answer.error is None]
    counts: dict[object, int] = {}
    for answer in readable:
        counts[answer.prediction] = counts.get(answer.prediction, 0) + 1
    counted = sorted(counts.items(), key=lambda item: -item[1])
    said = {"title": title, "counts": counted, "readable": readable, "unreadable": found[len(readable) :]}
    page_template("contact_sheet.html").stream(**said).dump(file)


WRITERS: dict[str, Callable[[TextIO, str, Sequence[object], Iterable[Answer]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    CONTACT_SHEET: _write_sheet,
}
"""By suffix."""
