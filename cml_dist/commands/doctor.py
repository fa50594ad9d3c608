"""``cml-dist doctor``: one report for all ranks."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.distributed.env import launched, launched_or_alone

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console
    from cml_dist.tools.doctor.findings import Report

PATIENCE = "parallel.hang_timeout_s=120"
"""A hang is to be seen within minutes here; the command line may say otherwise."""


def doctor(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.distributed.env import join_srun
    from cml_dist.telemetry.console import Console

    os.environ.update(join_srun())
    console = Console(quiet=args.json or launched_or_alone().rank > 0)
    from cml_dist.config.load import load_config
    from cml_dist.tools.doctor.examine import examine
    from cml_dist.tools.doctor.findings import Case

    overrides = [PATIENCE, *args.overrides]
    if args.config is not None and "=" in args.config and not os.path.exists(args.config):
        overrides.insert(1, args.config)  # the first override, where no configuration is named
        args.config = None
    config = load_config(args.config or "glyphs", overrides, console.warn)
    case = Case(config, args.config, Path(args.run_dir or config.run.dir), launched())
    count = itertools.count()

    def present(report: Report) -> None:
        running.close()
        if args.json:
            print(json.dumps(report.as_dict(), indent=2), flush=True)
        console.header("cml-dist doctor", report.head())
        console.findings(report.groups())
        faults = [(f"{row.check}: {row.value}", row.remedy) for row in report.of("fault")]
        console.verdict(report.verdict(), report.ready, faults)

    with ExitStack() as running:
        view = running.enter_context(console.progress("checks", None))
        ready = examine(case, present, lambda name: view.update(next(count), name))
    return 0 if ready else 1
