"""``cml-dist status``: one run as a panel, several as a table."""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from cml_dist.errors import CmlError, ConfigError

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console
    from cml_dist.tools.run_status import RunView


def status(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.telemetry.console import redrawn
    from cml_dist.tools import run_status

    if args.check:
        if args.watch is not None:
            raise ConfigError("--check answers once", "leave --watch out, or --check")
        views = [run_status.state_of(run_dir) for run_dir in args.run_dir]
        for view in views:
            print(run_status.check_line(view))
        return run_status.worst_exit_code(views)
    if len(args.run_dir) == 1 and not os.path.isdir(args.run_dir[0]):
        raise CmlError(f"there is no folder {args.run_dir[0]}", "name the run.dir of a training run")

    def draw(console: Console) -> None:
        if args.json:
            found = [view.as_dict() for view in views]
            print(json.dumps(found[0] if len(found) == 1 else found, indent=2), flush=True)
        elif len(views) == 1:
            console.header(views[0].run_dir, run_status.rows_of(views[0]))
        else:
            parent, names = run_status.names_of(views)
            rows = [run_status.columns_of(view, name) for view, name in zip(views, names, strict=True)]
            console.table(parent, run_status.COLUMNS, rows)
            for view, name in zip(views, names, strict=True):
                if view.state != "running" and view.reason:
                    console.note(f"{name}: {view.state}, {view.reason}")

    views: list[RunView] = []
    with (
        suppress(KeyboardInterrupt),
        redrawn(console) if args.watch and not args.json else nullcontext(lambda draw: draw(console)) as show,
    ):
        while True:
            views[:] = [run_status.look(run_dir) for run_dir in args.run_dir]
            show(draw)
            if args.watch is None or all(view.state == "finished" for view in views):
                break
            time.sleep(args.watch)
    return 0
