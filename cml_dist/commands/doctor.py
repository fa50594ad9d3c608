"""``cml-dist doctor``: the report of all ranks."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from cml_dist.parallel.launched import launched_or_alone

if TYPE_CHECKING:
    from cml_dist.doctor.report import Report
    from cml_dist.telemetry.console import Console


def doctor(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.parallel.srun import join_srun
    from cml_dist.telemetry.console import Console

    os.environ.update(join_srun())
    console = Console(quiet=args.json or launched_or_alone().rank > 0)
    from cml_dist.config.load import load_config
    from cml_dist.doctor.examine import Examination, bare_config, num_steps

    overrides = list(args.overrides)
    if args.config is not None and "=" in args.config and not os.path.exists(args.config):
        overrides.insert(0, args.config)  # the first override, where no configuration is named
        args.config = None
    config = bare_config(overrides) if args.config is None else load_config(args.config, overrides)
    run_dir = args.run_dir or config.run.dir

    def present(report: Report) -> None:
        if args.json:
            print(json.dumps(report.as_dict(), indent=2), flush=True)
            return
        console.header("cml-dist doctor", report.head())
        console.findings(report.groups())
        faults = [(f"{row.check}: {row.value}", row.remedy) for row in report.of("fault")]
        console.verdict(report.verdict(), report.ready, faults)

    with console.progress("looking", num_steps()) as view:
        examination = Examination(config, args.config, run_dir, present, lambda done, at: view.update(done, at))
        code = examination.run()
    if examination.hung:  # a thread that hangs would keep the interpreter from going down
        sys.stdout.flush()
        os._exit(code)
    return code
