"""``cml_dist.train`` and ``cml_dist.evaluate``: what the commands do, for Python that goes on afterwards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cml_dist.config.load import load_config
from cml_dist.config.plan import make_plan
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.env import check_launch, launched_or_alone, set_torch_defaults
from cml_dist.errors import ConfigError
from cml_dist.run.folder import run_config
from cml_dist.run.hooks import OnStep, nothing
from cml_dist.run.interrupts import Interrupts
from cml_dist.telemetry.console import Console


def train(
    config: str | Path, settings: Sequence[str] = (), *, preset: str | None = None, on_step: OnStep = nothing
) -> Path:
    """Meta-train, or resume the run in ``run.dir``; then test and export it, as ``cml-dist train``.

    Args:
        config: a recipe by name, or a YAML file.
        settings: ``key=value`` each, e.g. ``["domain.root=data/mine", "run.dir=runs/mine"]``.
        preset: ``"quick"``, ``"standard"`` or ``"paper"``.
        on_step: a hook, see :mod:`cml_dist.run.hooks`.

    Returns:
        The run's folder, for :func:`cml_dist.load` and :func:`cml_dist.evaluate`.

    Raises:
        CmlError: anything a user can mend.
        KeyboardInterrupt: a signal stopped it; all is saved, and the same call goes on.
    """
    console = _console()
    asked = load_config(str(config), settings, console.warn, preset)
    _check(asked)
    from cml_dist.run.splits import train_splits
    from cml_dist.run.trainer import train

    with Interrupts(asked.run.stop_signals) as interrupts:
        finished = (train_splits if asked.all_splits else train)(asked, console, interrupts, on_step).finished
    if not finished:
        raise KeyboardInterrupt(f"the run in {asked.run.dir} was stopped and saved; the same call goes on")
    return Path(asked.run.dir)


def evaluate(run: str | Path, settings: Sequence[str] = (), *, checkpoint: str = "best") -> dict[str, Any]:
    """Test a run again, as ``cml-dist eval``.

    Args:
        run: its folder.
        settings: by which the test is another one, e.g. ``["eval.episodes=2000"]``.
        checkpoint: ``"best"`` by validation, ``"last"``, or a kept step.

    Returns:
        What ``eval.json`` holds. Each learner (``"meta"``, ``"co"``) has a dict of ``mean``, ``ci95`` and ``episodes``;
        the rest (``"untrained"``, ``"chance"``, ``"step"``, ...) is what it was compared with and tested by.

    Raises:
        CmlError: anything a user can mend.
    """
    console = _console()
    config = run_config(run, settings, console.warn)
    if config.all_splits:
        raise ConfigError(f"{run} holds a run for each class split", "name the folder of one of them")
    _check(config)
    from cml_dist.run.report import evaluate_run

    return evaluate_run(config, checkpoint, console)


def _console() -> Console:
    set_torch_defaults()
    return Console(quiet=launched_or_alone().rank > 0)


def _check(config: RunConfig) -> None:
    make_plan(config, check_launch(config.parallel.processes).size, os.environ)
