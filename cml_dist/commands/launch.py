"""``cml-dist launch``: a command in several processes here, a job for SLURM, or the files for both."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console


def local(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.tools.local import launch_here

    return launch_here(args, args.inner, console.note)


def slurm(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.tools.slurm import follow, prepare, submit

    batch = prepare(args, console.warn)
    if args.dry_run:
        print(batch.script, end="")
        return
    for says, command in follow(batch, submit(batch)):
        console.command(says, command)


def files(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.tools.launch_files import write_launch_files

    for path in write_launch_files(Path(args.dir)):
        console.note(path)
