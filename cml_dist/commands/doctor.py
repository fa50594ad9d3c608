"""``cml-dist doctor``: one report for all ranks."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.distributed.env import join_srun, launched, launched_or_alone

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console
    from cml_dist.tools.doctor.checks import Finding

PATIENCE = "parallel.hang_timeout_s=120"
"""A hang is to be seen within minutes here; the command line may say otherwise."""

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "fault": "bold red"}


def doctor(args: argparse.Namespace, console: Console) -> int:
    from rich.text import Text

    from cml_dist.config.load import load_config
    from cml_dist.telemetry.console import Console
    from cml_dist.telemetry.text import printable

    if not args.json:
        console.loading()
    from cml_dist.tools.doctor.checks import Case
    from cml_dist.tools.doctor.examine import examine

    os.environ.update(join_srun())
    console = Console(quiet=args.json or launched_or_alone().rank > 0)
    overrides = [PATIENCE, *args.overrides]
    if args.config is not None and "=" in args.config and not os.path.exists(args.config):
        overrides.insert(1, args.config)  # the first override, where no configuration is named
        args.config = None
    config = load_config(args.config or "glyphs", overrides, console.warn, args.preset)
    case = Case(config, args.config, Path(args.run_dir or config.run.dir), launched())
    none = "none named: that of glyphs stands for it, without data"
    console.header("cml-dist doctor", {"configuration": args.config or none, "run folder": case.run_dir})

    def present(rows: list[Finding]) -> None:
        faults, warnings = ([row for row in rows if row.verdict == verdict] for verdict in ("fault", "warning"))
        said = f"Not ready: {len(faults)} fault{'s' * (len(faults) > 1)}" if faults else "Ready"
        said += f", with {len(warnings)} warning{'s' * (len(warnings) > 1)}" if warnings else ""
        if args.json:
            about = {"ready": not faults, "verdict": said, "configuration": args.config, "run_dir": str(case.run_dir)}
            print(json.dumps({**about, "findings": [asdict(row) for row in rows]}, indent=2), flush=True)
        for row in rows:
            console.say(Text.assemble((f"  {row.verdict:<7}", STYLES[row.verdict]), printable(f"  {row}")), hang=11)
        console.say(Text(said, style=STYLES["fault" if faults else "ok"]))
        for number, row in enumerate(faults, start=1):
            console.note(f"  {number}. {row}")

    return 0 if examine(case, present) else 1
