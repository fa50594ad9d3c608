"""``cml-dist eval`` and ``cml-dist export``: what a trained run is used for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cml_dist.parallel.arrival import arrive

if TYPE_CHECKING:
    from cml_dist.config.schema import RunConfig
    from cml_dist.telemetry.console import Console


def evaluate(args: argparse.Namespace, console: Console) -> None:
    config = _arrived(args)
    from cml_dist.run.finished import evaluate_run

    evaluate_run(config, args.checkpoint, console)


def export(args: argparse.Namespace, console: Console) -> None:
    config = _arrived(args)
    from cml_dist.run.finished import export_again

    export_again(config, args.checkpoint, args.to, console)


def _arrived(args: argparse.Namespace) -> RunConfig:
    """The run's configuration; other processes notice from now on where this one dies, also while it imports torch."""
    from cml_dist.run.folder import run_config

    config = run_config(args.run_dir, args.overrides)
    arrive(config.parallel)
    return config
