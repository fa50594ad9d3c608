"""``cml-dist compare`` and ``cml-dist report``: runs beside each other, as tables and as a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.errors import CmlError, ConfigError

if TYPE_CHECKING:
    from cml_dist.experiments.compare_tables import Table
    from cml_dist.telemetry.console import Console


def compare(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.experiments.compare import compare, find_runs, read_run
    from cml_dist.experiments.compare_tables import as_csv, tables

    if not 0 < args.reach <= 100:
        raise ConfigError(f"--reach is {args.reach:g}", "give per cent of the best validation, above 0 and at most 100")
    runs = []
    for folder in find_runs(args.runs):
        try:
            runs.append(read_run(folder))
        except CmlError as error:
            console.warn(f"Left out: {error}")
    found = compare(runs, args.baseline, args.reach / 100)
    made = tables(found)
    for table in made:
        console.table(*table)
    for note in found.notes:
        console.note(note)
    write_tables(args, console, as_csv(found), made)


def write_tables(
    args: argparse.Namespace, console: Console, numbers: str, tables: Sequence[Table], notes: Sequence[str] = ()
) -> None:
    """Where ``--csv``, ``--latex`` and ``--md`` ask for them."""
    from cml_dist.atomic import write_text
    from cml_dist.experiments.compare_tables import latex, markdown

    for place, written in ((args.csv, numbers), (args.latex, latex(tables, notes)), (args.md, markdown(tables, notes))):
        if place:
            write_text(Path(place), written)
            console.note(f"Written: {place}")


def report(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.experiments.compare import find_runs
    from cml_dist.experiments.report_figures import draw_all, draw_fits
    from cml_dist.experiments.report_page import check_out, figures_folder, write_report
    from cml_dist.experiments.report_runs import Shown, read_shown
    from cml_dist.experiments.scale_shown import shown_study

    if args.episodes < 0:
        raise ConfigError(f"--episodes is {args.episodes}", "give 0 or more")
    check_out(out := Path(args.out))
    studies = {folder: study for folder in args.runs if (study := shown_study(folder)) is not None}
    runs = [folder for folder in args.runs if folder not in studies]
    shown = read_shown(find_runs(runs), args.baseline) if runs else Shown("", (), (), (), ())
    for warning in shown.warnings:
        console.warn(warning)
    samples, fits, absent = [], None, "no run is finished and tested" if args.episodes else "none were asked for"
    if args.episodes and shown.comparisons:
        console.loading()
        from cml_dist.experiments.report_samples import Sample, sample_episodes

        try:
            samples, absent = sample_episodes(shown, shown.comparisons[0][1], args.episodes), ""
        except CmlError as error:
            absent = str(error)
            console.warn(f"No sample episodes: {absent}")
        if samples and not isinstance(samples[0], Sample):
            samples, fits = [], draw_fits(samples, {variant.number: variant.name for variant in shown.variants})
    write_report(out, shown, [*draw_all(shown)], samples, fits, absent, [*studies.values()])
    console.note(f"Written: {out}, and its figures in {figures_folder(out)}")
