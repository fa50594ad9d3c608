"""``cml-dist status``: one run as a panel, several as a table."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.errors import CmlError, ConfigError

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console
    from cml_dist.tools.run_status import RunView


def status(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.tools.run_status import RunView

    if args.check:
        if args.watch is not None or args.json:
            raise ConfigError("--check answers once, a line a run", "leave --watch and --json out, or --check")
        return _check(args.run_dir)
    if len(args.run_dir) == 1 and not os.path.isdir(args.run_dir[0]):
        raise CmlError(f"there is no folder {args.run_dir[0]}", "name the run.dir of a training run")
    with suppress(KeyboardInterrupt):
        while True:
            views = [RunView(run_dir) for run_dir in args.run_dir]
            if args.json:
                data = [view.data for view in views]
                print(json.dumps(data[0] if len(data) == 1 else data, indent=2), flush=True)
            else:
                if args.watch is not None:
                    console.clear()
                _show(views, console)
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


def _show(views: Sequence[RunView], console: Console) -> None:
    paths = [Path(view.data["run_dir"]) for view in views]
    if len(views) == 1:
        console.header(str(paths[0]), views[0].rows())
        return
    in_one = len({path.parent for path in paths}) == 1 and paths[0].parent != Path()
    rows = [view.columns(path.name if in_one else str(path)) for view, path in zip(views, paths, strict=True)]
    title = str(paths[0].parent) if in_one else "Runs"
    console.table(title, list(rows[0]), [list(row.values()) for row in rows])
    for view, row in zip(views, rows, strict=True):
        if view.data["state"] != "running" and view.data["reason"]:
            console.note(f"{row['run']}: {view.data['state']}, {view.data['reason']}")
