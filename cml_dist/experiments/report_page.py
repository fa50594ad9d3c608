"""The page of ``cml-dist report``: one HTML file with everything in it, and a folder of its figures."""

from __future__ import annotations

import os
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist import __version__
from cml_dist.atomic import write_text
from cml_dist.config.keys import as_yaml
from cml_dist.errors import ConfigError
from cml_dist.experiments.compare import Comparison, short_key
from cml_dist.experiments.compare_tables import tables
from cml_dist.experiments.report_figures import RIGHT, WRONG, Drawn, style
from cml_dist.experiments.report_runs import Shown, ShownVariant
from cml_dist.experiments.scale_shown import ShownStudy
from cml_dist.run.status import now
from cml_dist.tools.page import page_template

if TYPE_CHECKING:
    from cml_dist.experiments.report_samples import Sample

COMMON = (
    "domain.name", "domain.ways", "domain.shots", "model.backbone", "method.name", "method.inner_steps", "optim.lr",
    "train.steps",
)  # fmt: skip
"""Settings that are named where all runs have them alike."""

DASHES = {"-": "", "--": "6 3", "-.": "6 2 2 2", ":": "2 2"}


def check_out(out: Path) -> None:
    """Raise ConfigError where no page can be written there, before the work."""
    if out.suffix.lower() != ".html" or out.is_dir():
        raise ConfigError(f"--out is {out}", "give the name of a file that ends in .html")
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"--out is {out}, but {there} is no folder that one can write to", "choose another place")


def figures_folder(out: Path) -> Path:
    """Beside the page, where its figures are files."""
    return out.with_name(f"{out.stem}_figures")


def write_report(
    out: Path,
    shown: Shown,
    figures: Sequence[Drawn],
    samples: Sequence[Sample],
    fits: Drawn | None,
    absent: str,
    studies: Sequence[ShownStudy] = (),
) -> None:
    """Write page and figures, each whole or not at all; those of an earlier report are replaced.

    Args:
        samples, fits: sample episodes of pictures, or of curves.
        absent: why there are none.
        studies: of scaling, each a section of its own.

    Raises:
        CmlError: the file system refused.
    """
    folder = figures_folder(out)
    for figure in (*figures, *([fits] if fits else [])):
        figure.write(folder)
    last = [Path(study.folder).name for study in studies]
    for number, (study, name) in enumerate(zip(studies, last, strict=True), 1):
        for figure in study.figures:
            figure.write(folder, f"{name}-{number}-" if last.count(name) > 1 else f"{name}-")
    count, variants = sum(len(variant.runs) for variant in shown.variants), shown.variants
    about = f"{count} run{'s' * (count > 1)}, {len(variants)} variant{'s' * (len(variants) > 1)}" if variants else ""
    about = "; ".join(filter(None, (about, ", ".join(f"scaling study {study.folder}" for study in studies))))
    compared = [
        (title, [(heading, columns, _numbered(shown, found, rows)) for heading, columns, rows in tables(found)])
        for title, found in shown.comparisons
    ]
    page = page_template("report.html").render(
        title=out.stem,
        about=f"{about}; {now()[:10]}, cml-dist {__version__}. Figures as SVG and PNG: {folder.name}/",
        shown=shown,
        common=_common(variants),
        columns=["variant", *map(short_key, shown.differing), "seeds", "state"],
        runs=[(variant.number, _row(shown, variant)) for variant in variants],
        names={variant.number: variant.name for variant in variants},
        comparisons=compared,
        figures=figures,
        samples=samples,
        fits=fits,
        absent=absent,
        studies=studies,
        style=style,
        dashes=lambda number: DASHES[style(number)["linestyle"]],
        letter=lambda label: string.ascii_uppercase[label] if label < 26 else str(label),
        right=RIGHT,
        wrong=WRONG,
    )
    write_text(out, page)


def _numbered(shown: Shown, found: Comparison, rows: Sequence[list[str]]) -> list[tuple[int, list[str]]]:
    """Rows of a table with the number of their variant."""
    return [(shown.variant_of(v.runs[0]).number, row) for v, row in zip(found.variants, rows, strict=True)]


def _row(shown: Shown, variant: ShownVariant) -> list[str]:
    """Its settings that others have otherwise, its seeds, and how its runs stand."""
    states = Counter(run.state for run in variant.runs)
    settings = [as_yaml(variant.settings.get(key)) for key in shown.differing]
    stand = ", ".join(f"{count} {state}" for state, count in states.items())
    return [variant.runs[0].method, *settings, " ".join(str(run.seed) for run in variant.runs), stand]


def _common(variants: Sequence[ShownVariant]) -> str:
    """Settings that all have alike."""
    each = [variant.settings for variant in variants] or [{}]
    keys = [key for key in COMMON if key in each[0] and all(one.get(key) == each[0][key] for one in each)]
    return ", ".join(f"{key}={as_yaml(each[0][key])}" for key in keys)
