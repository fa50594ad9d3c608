"""``domain.split=all``: a run for each way to divide the classes, and the spread of their tests over these splits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cml_dist.atomic import write_json, write_text
from cml_dist.config.load import dump_config, parse_config
from cml_dist.config.methods import learner_title
from cml_dist.config.schema import RunConfig
from cml_dist.data.build import build_domain
from cml_dist.distributed.world import joined_world
from cml_dist.errors import ConfigError
from cml_dist.run.folder import RunFolder, same_everywhere
from cml_dist.run.hooks import OnStep
from cml_dist.run.interrupts import Interrupts
from cml_dist.run.record import versions
from cml_dist.run.report import evaluate_run
from cml_dist.run.status import read_status
from cml_dist.run.trainer import Outcome, train
from cml_dist.telemetry.console import Console, ResultRow

MOST = 100
"""Splits that are trained without ``domain.splits``."""


def train_splits(config: RunConfig, console: Console, interrupts: Interrupts, on_step: OnStep) -> Outcome:
    """Train a run for each split, one after the other in one world; those that are finished stay as they are.

    Collective, and raises: as :func:`cml_dist.run.trainer.train`.
    """
    folder = RunFolder(config.run.dir)
    interrupts.raise_signals()
    with joined_world(config) as world:
        world.assert_same_across_ranks({**same_everywhere(config), **versions()})
        config, parts = world.run_on_all_ranks(lambda: _parts(folder.going_on(config)))

        def begin() -> list[int]:
            folder.check_contained()
            if folder.exists:
                folder.check_resumable(config)
            write_text(folder.config_file, dump_config(config))
            return [k for k, part in enumerate(parts) if not _is_finished(part)]

        for k in world.gather(world.run_on_all_ranks(begin if world.is_main else list))[0]:
            console.note(f"Class split {k}, of 0 to {len(parts) - 1}: {parts[k].run.dir}")
            outcome = train(parts[k], console, interrupts, on_step, world)
            world.accelerator.free_memory()
            if not outcome.finished:
                return outcome
        if config.eval.final:
            world.run_on_main(lambda: _report(config, [RunFolder(p.run.dir).own_test() for p in parts], console))
    return Outcome(config.train.steps, finished=True)


def evaluate_splits(config: RunConfig, which: str, console: Console) -> None:
    """Test a checkpoint of each split's run. Collective, and raises: as :func:`cml_dist.run.report.score_run`."""
    with joined_world(config) as world:
        config, parts = world.run_on_all_ranks(lambda: _parts(config))
        parts = [RunFolder(part.run.dir).going_on(part) for part in parts]  # each may have chosen its inner rate
        tests = [evaluate_run(part, which, console, world=world) for part in parts]
        world.run_on_main(lambda: _report(config, tests, console, which))


def _parts(config: RunConfig) -> tuple[RunConfig, list[RunConfig]]:
    """``config`` with the number of splits, and the run of each, whose data are known to fill episodes."""
    data, seeds = config.model_dump(mode="json"), {"train_seed": config.run.seed, "eval_seed": config.eval.seed}
    there, asked = build_domain(config.domain, **seeds).num_splits, config.domain.splits
    if (asked or there) > (most := there if asked else MOST):
        what = f"domain.splits is {asked or 'null (all)'}, but there are {there:,} ways to divide the classes"
        raise ConfigError(what, f"set domain.splits to {most} or less")
    config = parse_config({**data, "domain": {**data["domain"], "splits": asked or there}})
    parts = []
    for k, path in enumerate(RunFolder(config.run.dir).parts(config)):
        own = {"domain": {**data["domain"], "split": k, "splits": None}, "run": {**data["run"], "dir": str(path)}}
        parts.append(parse_config({**data, **own}))
        build_domain(parts[k].domain, **seeds)
    return config, parts


def _is_finished(part: RunConfig) -> bool:
    """Whether its run is, by these settings: another is for :func:`train` to go on with, or to refuse."""
    folder = RunFolder(part.run.dir)
    status, tested = read_status(folder.status_file), folder.own_test() is not None or not part.eval.final
    return tested and status is not None and status.state == "finished" and folder.is_as(part)


def _report(config: RunConfig, tests: list[dict[str, Any]], console: Console, which: str = "best") -> None:
    """Show and keep the tests of the splits, their mean and their spread (docs/reference/run-folder.md)."""
    summary = {key: tests[0][key] for key in ("score", "split", "chance", "method", "overrides")}
    rows, columns = [], ("mean", "ci95", "episodes")
    for learner in filter(tests[0].__contains__, ("meta", "co")):
        each, title = [test[learner] for test in tests], learner_title(config, learner)
        means, widths = (np.array([one[key] for one in each], float) for key in ("mean", "ci95"))
        numbers = {"mean": means.mean(), "ci95": np.hypot.reduce(widths) / len(each)}
        numbers |= {"splits_sd": means.std(ddof=1), "splits_min": means.min(), "splits_max": means.max()}
        found = {key: float(value) if math.isfinite(value) else None for key, value in numbers.items()}
        summary[learner] = found | {"episodes": sum(one["episodes"] for one in each)}
        shown = {f"split {k}": one for k, one in enumerate(each)} | {f"mean of {len(each)} splits": summary[learner]}
        shown |= {f"{name} of splits": {"mean": found[f"splits_{name}"]} for name in ("sd", "min", "max")}
        rows += [ResultRow(f"{title}, {what}", *map(one.get, columns)) for what, one in shown.items()]
    folder, asked = RunFolder(config.run.dir), ({} if which == "best" else {"checkpoint": which}) | summary["overrides"]
    path = folder.new_eval_file(asked) if asked else folder.splits_file
    write_json(path, {**summary, "splits": tests})
    console.results(rows, title=f"{config.eval.split} split", score_name=summary["score"])
    console.note(f"Scores: {path}")
