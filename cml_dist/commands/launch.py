"""``cml-dist launch slurm``: the job is submitted, and how to follow it said."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console


def launch(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.tools.slurm import follow, prepare, submit

    batch = prepare(args, console.warn)
    if args.dry_run:
        print(batch.script, end="")
        return
    for line in follow(batch, submit(batch)):
        console.note(line)
