"""``cml-dist status``: one run as a panel, several as a table."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.errors import CmlError, ConfigError

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console
    from cml_dist.tools.run_status import RunView

LEAST = ("saved", "starts", "ep/s", "loss", "of", "method", "best", "left")
"""The columns that a narrow screen can do without, the least worth first."""


def status(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.experiments.sweep import runs_of
    from cml_dist.tools.run_status import RunView

    if args.check:
        if args.watch is not None or args.json:
            raise ConfigError("--check answers once, a line a run", "leave --watch and --json out, or --check")
        return _check([run for named in args.run_dir for run in runs_of(named) or [named]])
    for named in args.run_dir:
        if not os.path.isdir(named):
            raise CmlError(f"there is no folder {named}", "name the run.dir of a training run, or a folder of such")
        if not runs_of(named):
            raise CmlError(f"no run has begun in {named}, nor below it", "name the run.dir of a training run")
    with suppress(KeyboardInterrupt):
        while True:
            # Looked for again each time: a sweep adds runs.
            runs = [run for named in args.run_dir for run in runs_of(named)]
            views = [RunView(run) for run in runs]
            if args.json:
                data = [view.data for view in views]
                print(json.dumps(data[0] if runs == args.run_dir[:1] else data, indent=2), flush=True)
            else:
                if args.watch is not None:
                    console.clear()
                _show(views, console, None if runs == args.run_dir else args.run_dir)
            if args.watch is None or all(view.data["state"] == "finished" for view in views):
                break
            time.sleep(max(0.1, args.watch))
    return 0


def _check(run_dirs: Sequence[str]) -> int:
    """A line a run, e.g. ``runs/a: stopped, step 120/500 (SIGUSR1)``, and the exit code of the worst."""
    from cml_dist.telemetry.text import line
    from cml_dist.tools.run_status import EXIT_CODES, state_of

    found = [state_of(run_dir) for run_dir in run_dirs]
    for run in found:
        step = f", step {run['step']}/{run['steps']}" if "step" in run else ""
        print(line(f"{run['run_dir']}: {run['state']}{step}" + (f" ({run['reason']})" if run["reason"] else "")))
    return EXIT_CODES[max((run["state"] for run in found), key=list(EXIT_CODES).index)]


def _show(views: Sequence[RunView], console: Console, below: Sequence[str] | None) -> None:
    """A panel of one run that was named; a table of several, or of those ``below`` a folder."""
    from cml_dist.telemetry.text import duration
    from cml_dist.tools.run_status import time_left

    paths = [Path(view.data["run_dir"]) for view in views]
    if len(views) == 1 and below is None:
        console.header(str(paths[0]), views[0].rows())
        return
    parents = {Path(folder) for folder in below} if below else {path.parent for path in paths}
    base = parents.pop() if len(parents) == 1 else Path()
    names = [str(path.relative_to(base) if base != Path() else path) for path in paths]
    rows = [view.columns(name) for view, name in zip(views, names, strict=True)]
    title = "Runs" if base == Path() else str(base)
    console.table(title, list(rows[0]), [list(row.values()) for row in rows], least=LEAST)
    for view, row in zip(views, rows, strict=True):
        if view.data["state"] != "running" and view.data["reason"]:
            console.note(f"{row['run']}: {view.data['state']}, {view.data['reason']}")
    if below is not None:
        counts = Counter(view.data["state"] for view in views)
        left_s = time_left(views)
        left = f"; about {duration(left_s)} left, without validations and tests" if left_s else ""
        console.note(", ".join(f"{count} {state}" for state, count in counts.items()) + left)
