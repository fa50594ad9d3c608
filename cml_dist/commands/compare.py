"""``cml-dist compare``: finished runs beside each other, on the same test episodes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.errors import CmlError, ConfigError

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console


def compare(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.atomic import write_text
    from cml_dist.run.compare import compare, find_runs, read_run
    from cml_dist.tools.compare_tables import as_csv, as_latex, as_markdown, tables

    if not 0 < args.reach <= 100:
        raise ConfigError(f"--reach is {args.reach:g}", "give per cent of the best validation, above 0 and at most 100")
    runs = []
    for folder in find_runs(args.runs):
        try:
            runs.append(read_run(folder))
        except CmlError as error:
            console.warn(f"Left out: {error}")
    found = compare(runs, args.baseline, args.reach / 100)
    for table in tables(found):
        console.table(*table)
    for note in found.notes:
        console.note(note)
    for place, written in ((args.csv, as_csv), (args.latex, as_latex), (args.md, as_markdown)):
        if place:
            write_text(Path(place), written(found))
            console.note(f"Written: {place}")
