"""A scaling study as people look at it: tables, notes and pictures, as files and in a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cml_dist.experiments.report_figures import Drawn
from cml_dist.experiments.scale import read_study
from cml_dist.experiments.scale_figures import draw_study, variant_numbers
from cml_dist.experiments.scale_tables import notes, tables


@dataclass(frozen=True)
class ShownStudy:
    """A study on a page; rows of ``tables`` come with the number of their variant."""

    folder: str
    tables: list[tuple[str, tuple[str, ...], list[tuple[int, tuple[object, ...]]]]]
    notes: tuple[str, ...]
    figures: tuple[Drawn, ...]

    @property
    def stem(self) -> str:
        """Of the names of its figures on a page of several."""
        return Path(self.folder).name


def shown_study(folder: str) -> ShownStudy | None:
    """The study in a folder; None: it is none, or nothing is measured yet.

    Raises:
        CheckpointError: it is damaged.
    """
    study = read_study(folder)
    if study is None or not study["cells"]:
        return None
    numbers = variant_numbers(study)
    numbered = [(title, columns, [(numbers[row[0]], row) for row in rows]) for title, columns, rows, _ in tables(study)]
    return ShownStudy(folder, numbered, tuple(notes(study)), tuple(draw_study(study)))


def write_figures(folder: Path, study: Mapping[str, Any]) -> list[str]:
    """PNG and SVG of each figure; returns their names."""
    figures = [*draw_study(study)]
    for figure in figures:
        figure.write(folder)
    return [figure.name for figure in figures]
