"""``cml-dist eval`` and ``cml-dist export``: what a trained run is used for."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from cml_dist.distributed.env import check_launch
from cml_dist.errors import ConfigError

if TYPE_CHECKING:
    from cml_dist.config.schema import RunConfig
    from cml_dist.telemetry.console import Console


def evaluate(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.run.folder import on_set

    config = _config_of(args, console)
    sets = {place: on_set(config, place) for place in args.on}
    if sets and args.plot:
        raise ConfigError("--plot draws fits of curves, and --on names image sets", "leave one of them out")
    if config.all_splits and args.plot:
        raise ConfigError("--plot draws fits of one run, and this is one for each class split", "leave it out")
    from cml_dist.run.report import evaluate_run, evaluate_sets

    if sets:
        evaluate_sets(sets, args.checkpoint, console)
    elif config.all_splits:
        from cml_dist.run.splits import evaluate_splits

        evaluate_splits(config, args.checkpoint, console)
    else:
        evaluate_run(config, args.checkpoint, console, args.plot)


def export(args: argparse.Namespace, console: Console) -> None:
    config = _config_of(args, console)
    if config.all_splits:
        raise ConfigError(f"{args.run_dir} holds a run for each class split", "name the folder of one of them")
    from cml_dist.run.export import export_again

    export_again(config, args.checkpoint, args.to, console)


def _config_of(args: argparse.Namespace, console: Console) -> RunConfig:
    """The run's configuration, in a world that can be."""
    from cml_dist.config.plan import make_plan
    from cml_dist.run.folder import run_config

    config = run_config(args.run_dir, args.overrides, console.warn)
    make_plan(config, check_launch(config.parallel.processes).size, os.environ)
    console.loading()
    return config
