"""The test of a run: both learners on the fixed episodes of a split, beside the untrained network and chance."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np

from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.errors import CheckpointError
from cml_dist.parallel.world import World
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.assemble import Parts
from cml_dist.run.checkpoint import Checkpoint
from cml_dist.run.evaluator import EvalReport, evaluate
from cml_dist.run.folder import RunFolder, write_bytes, write_json
from cml_dist.telemetry.console import Console, ResultRow
from cml_dist.types import Params


def chosen_checkpoint(folder: RunFolder, which: str = "best") -> Checkpoint:
    """The checkpoint of the best validation (``best``), the newest (``last``), or of a step (its number).

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if which not in ("best", "last"):
        if not which.isdigit() or int(which) not in checkpoints.steps_in(folder.checkpoints):
            raise CheckpointError(
                f"{folder.path} keeps no checkpoint {which!r}",
                f"use best, last, or one of the steps {checkpoints.steps_in(folder.checkpoints)}",
            )
        return checkpoints.load(checkpoints.path_of(folder.checkpoints, int(which)))
    newest, _ = checkpoints.load_newest(folder.checkpoints)
    if newest is None:
        raise CheckpointError(f"{folder.path} has no checkpoint yet", "train it first: cml-dist train")
    best = newest.state.get("best")
    if which == "last" or best is None or best["step"] == newest.step:
        return newest
    path = checkpoints.path_of(folder.checkpoints, best["step"])
    try:
        return checkpoints.load(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"the best step's {error.what}",
            "test or export the newest one instead: cml-dist eval RUN_DIR --checkpoint last",
        ) from error


def score_run(
    config: RunConfig,
    plan: RunPlan,
    parts: Parts,
    folder: RunFolder,
    world: World,
    console: Console,
    which: str = "best",
) -> dict[str, Any]:
    """Test a run's checkpoint, write ``eval.json`` and the per-episode scores, and show the table.

    Collective: all ranks.
    """
    checkpoint = world.together(lambda: chosen_checkpoint(folder, which))
    world.together(lambda: checkpoints.check_fits(checkpoint, checkpoints.layout_of(parts.net)))
    params = world.together(checkpoint.params)
    reports = _score(config, plan, parts, world, console, params, "Testing")
    initial = {n: p.detach() for n, p in parts.net.named_parameters()}
    floor = _score(config, plan, parts, world, console, initial, "Testing untrained") if config.eval.untrained else {}
    summary: dict[str, Any] = {learner: report.summary() for learner, report in reports.items()}
    summary |= {
        "untrained": {learner: report.summary() for learner, report in floor.items()},
        "chance": parts.domain.chance,
        "score": parts.domain.score_name,
        "split": config.eval.split,
        "step": checkpoint.step,
        "chosen": which,
        "inner_steps": plan.test_inner_steps,
        "co_adapt": config.eval.co_adapt,
        "seed": config.eval.seed,
    }
    if world.is_main:
        arrays = {learner: report.scores.numpy() for learner, report in reports.items()}
        arrays |= {f"untrained_{learner}": report.scores.numpy() for learner, report in floor.items()}
        scores = io.BytesIO()
        np.savez(scores, **arrays)
        write_bytes(folder.scores_file, scores.getvalue())
        write_json(folder.eval_file, summary)
        rows = [_row(learner_name(config.method.name, learner), report) for learner, report in reports.items()]
        rows += [_row(f"untrained {learner_name(config.method.name, learner)}", r) for learner, r in floor.items()]
        if parts.domain.chance is not None:
            rows.append(ResultRow("chance", parts.domain.chance))
        title = f"{config.eval.split} split, step {checkpoint.step} ({which})"
        console.results(rows, title=title, score_name=parts.domain.score_name)
    return summary


def _score(
    config: RunConfig, plan: RunPlan, parts: Parts, world: World, console: Console, params: Params, what: str
) -> dict[str, EvalReport]:
    params = {n: p.to(world.device, parts.dtype) for n, p in params.items()}
    model = parts.model.to(world.device)
    with console.progress(what, config.eval.episodes) as view:
        return evaluate(
            params,
            model.problem,
            replace(model.method, inner_steps=plan.test_inner_steps),
            parts.domain,
            world,
            split=config.eval.split,
            num_episodes=config.eval.episodes,
            learners=model.problem.learners,
            co_adapt=config.eval.co_adapt,
            dtype=parts.dtype,
            workers=config.domain.workers,
            progress=view.update,
        )


def learner_name(method: str, learner: str) -> str:
    """What people call a learner: CML (eq. 8), CML-dagger (eq. 9), or the baseline's own name."""
    return "CML-dagger" if learner == "co" else method.upper()


def _row(name: str, report: EvalReport) -> ResultRow:
    return ResultRow(name, report.mean, report.ci95, len(report.scores))
