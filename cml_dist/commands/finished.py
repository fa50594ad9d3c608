"""``cml-dist eval`` and ``cml-dist export``: what a trained run is used for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
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
    if Path(args.run_dir).is_file():
        _export_adapted(args, console)
        return
    config = _config_of(args, console)
    if config.all_splits:
        raise ConfigError(f"{args.run_dir} holds a run for each class split", "name the folder of one of them")
    from cml_dist.run.export import UNKNOWN, Wanted, export_again
    from cml_dist.run.onnx_file import check_installed

    if args.onnx:
        check_installed()
    export_again(config, Wanted(args.checkpoint, args.to, args.onnx, args.license or UNKNOWN), console)


def _export_adapted(args: argparse.Namespace, console: Console) -> None:
    """A classifier that ``predict --save`` wrote, as an ONNX file."""
    if not args.onnx or args.license or args.checkpoint != "best":
        raise ConfigError(
            f"{args.run_dir} is an adapted classifier, which is exported as ONNX alone",
            "give --onnx, and leave --checkpoint and --license out",
        )
    console.loading()
    from cml_dist.run.adapted import AdaptedLearner
    from cml_dist.run.predict import load

    learner, source = load(args.run_dir, code=args.overrides), Path(args.run_dir)
    assert isinstance(learner, AdaptedLearner)
    path = Path(args.to or source.parent) / f"{source.stem}.onnx"
    learner.to_onnx(path)
    console.note(f"ONNX file: {path}")


def _config_of(args: argparse.Namespace, console: Console) -> RunConfig:
    """The run's configuration, in a world that can be."""
    from cml_dist.config.plan import make_plan
    from cml_dist.run.folder import run_config

    config = run_config(args.run_dir, args.overrides, console.warn)
    make_plan(config, check_launch(config.parallel.processes).size, os.environ)
    console.loading()
    return config
