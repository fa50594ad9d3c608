"""``cml-dist eval`` and ``cml-dist export``: what a trained run is used for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console


def evaluate(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.run.finished import evaluate_run

    evaluate_run(args.run_dir, args.overrides, args.checkpoint, console)


def export(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.run.finished import export_again

    export_again(args.run_dir, args.overrides, args.checkpoint, args.to, console)
