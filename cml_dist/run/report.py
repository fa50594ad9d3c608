"""The test of a run: both learners on the fixed episodes of a split, beside the untrained network and chance."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cml_dist.config.methods import dagger_refusal, has_trained_colearner, learner_title, method_title
from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.errors import CheckpointError
from cml_dist.parallel.world import World
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.assemble import Parts
from cml_dist.run.checkpoint import Checkpoint, DamagedCheckpoint
from cml_dist.run.evaluator import EvalReport, evaluate
from cml_dist.run.folder import RunFolder, write_bytes, write_json
from cml_dist.run.same_checkpoint import same_checkpoint
from cml_dist.run.unfinished import Unfinished, forget_unfinished
from cml_dist.telemetry.console import Console, ResultRow
from cml_dist.types import Params


@dataclass(frozen=True)
class Choice:
    """The checkpoint that a test or an export uses.

    Attributes:
        checkpoint: verified.
        how: ``best`` (by validation), ``last``, or the step that was asked for.
        passed_over: faults of better or newer checkpoints, which are damaged.
    """

    checkpoint: Checkpoint
    how: str
    passed_over: tuple[CheckpointError, ...] = ()

    def say(self, console: Console) -> None:
        """Warn of what was passed over."""
        for fault in self.passed_over:
            console.warn(f"{fault.what}: step {self.checkpoint.step} is used ({self.how})")


def choose_checkpoint(
    folder: RunFolder, which: str = "best", progress: Callable[[], None] = lambda: None
) -> Choice:
    """The checkpoint of the best validation (``best``), the newest (``last``), or of a step (its number).

    Where ``best`` has none (never validated, or damaged) it is the newest, which then is called ``last``.

    Args:
        progress: see :func:`checkpoints.load`.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    if which not in ("best", "last"):
        if not which.isdigit() or int(which) not in checkpoints.steps_in(folder.checkpoints):
            raise CheckpointError(
                f"{folder.path} keeps no checkpoint {which!r}",
                f"use best, last, or one of the steps {checkpoints.steps_in(folder.checkpoints)}",
            )
        path = checkpoints.path_of(folder.checkpoints, int(which))
        return Choice(checkpoints.load(path, progress=progress), which)
    newest, faults = checkpoints.load_newest(folder.checkpoints, progress)
    if newest is None:
        raise CheckpointError(f"{folder.path} has no checkpoint yet", "train it first: cml-dist train")
    best = newest.state.get("best")
    if which == "best" and best is not None:
        if best["step"] == newest.step:
            return Choice(newest, "best", tuple(faults))
        try:
            path = checkpoints.path_of(folder.checkpoints, best["step"])
            return Choice(checkpoints.load(path, progress=progress), "best", tuple(faults))
        except DamagedCheckpoint as error:
            faults.append(error)
    return Choice(newest, "last", tuple(faults))


def overrides_of(config: RunConfig, parts: Parts, folder: RunFolder, checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings by which figures under ``config`` are not the run's own, also where ``domain.root`` is of other data."""
    changed = folder.test_overrides(config)
    data = parts.domain.fingerprint()
    if checkpoint.state.get("data", data) != data:
        changed["domain.root"] = getattr(config.domain, "root", None)
    return changed


def score_run(
    config: RunConfig,
    plan: RunPlan,
    parts: Parts,
    folder: RunFolder,
    world: World,
    console: Console,
    which: str = "best",
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Test a run's checkpoint, write summary and per-episode scores, and show the table.

    ``eval.json`` and ``eval_scores.npz`` are of the newest test. Each is also kept in ``evals/``: as ``own`` where
    settings and checkpoint are the run's own, else named by what is not.

    Args:
        stop: asked before each episode: whether to break off, and raise Stopped on all ranks; the next test goes on
            there. None: nothing breaks it off, and nothing is kept.

    Raises:
        CheckpointError: there is no checkpoint, none that fits, or a later start of the run has taken over the folder.

    Collective: all ranks.
    """
    world.watch.beat("looking for a checkpoint")

    def look() -> tuple[Checkpoint, tuple[str, tuple[CheckpointError, ...]]]:
        choice = choose_checkpoint(folder, which, world.watch.touch)
        return choice.checkpoint, (choice.how, choice.passed_over)

    checkpoint, (how, passed_over) = same_checkpoint(world, look, console.note)
    choice = Choice(checkpoint, how, passed_over)
    choice.say(console)
    world.together(lambda: checkpoints.check_fits(checkpoint, checkpoints.layout_of(parts.net)))
    world.together(lambda: checkpoints.check_constants(checkpoint, parts.net))
    params = world.together(checkpoint.params)

    def kept(params: str) -> Unfinished | None:
        what = {"params": params, "step": checkpoint.step, "data": parts.domain.fingerprint()}
        return None if stop is None else Unfinished(folder, what | config.eval.model_dump(mode="json"))

    reports = _score(config, plan, parts, world, console, params, "Testing", stop, kept("trained"))
    initial = {n: p.detach() for n, p in parts.net.named_parameters()}
    floor: dict[str, EvalReport] = {}
    if config.eval.untrained:
        floor = _score(config, plan, parts, world, console, initial, "Testing untrained", stop, kept("untrained"))
    summary: dict[str, Any] = {learner: report.summary() for learner, report in reports.items()}
    summary |= {
        "untrained": {learner: report.summary() for learner, report in floor.items()},
        "chance": parts.domain.chance,
        "score": parts.domain.score_name,
        "split": config.eval.split,
        "step": checkpoint.step,
        "chosen": choice.how,
        "overrides": world.together(lambda: overrides_of(config, parts, folder, checkpoint)),
        "method": method_title(config),
        "inner_steps": plan.test_inner_steps,
        "norm": config.eval.norm,
        "permutations": config.eval.permutations,
        "co_adapt": config.eval.co_adapt,
        "seed": config.eval.seed,
    }
    summary_file, scores_file = folder.eval_files(summary["overrides"], which)

    def write() -> None:
        arrays = {learner: report.scores.numpy() for learner, report in reports.items()}
        arrays |= {f"untrained_{learner}": report.scores.numpy() for learner, report in floor.items()}
        scores = io.BytesIO()
        np.savez(scores, **arrays)
        folder.check_ours()
        for path in (scores_file, folder.scores_file):
            write_bytes(path, scores.getvalue())
        for path in (summary_file, folder.eval_file):
            write_json(path, summary)
        if stop is not None:
            forget_unfinished(folder)

    world.together(write if world.is_main else lambda: None)
    if world.is_main:
        rows = [_row(learner_title(config, learner), report) for learner, report in reports.items()]
        rows += [_row(f"untrained {learner_title(config, learner)}", r) for learner, r in floor.items()]
        if parts.domain.chance is not None:
            rows.append(ResultRow("chance", parts.domain.chance))
        title = f"{config.eval.split} split, step {checkpoint.step} ({choice.how})"
        console.results(rows, title=title, score_name=parts.domain.score_name)
        if config.eval.permutations > 1:
            spread = ", ".join(
                f"{learner_title(config, learner)} {report.summary()['label_order_sd']:.4f}"
                for learner, report in reports.items()
            )
            console.note(
                f"Each episode under {config.eval.permutations} label orders; standard deviation over them: {spread}"
            )
        refused = dagger_refusal(config)
        if config.method.colearner is not False and refused is not None:
            hint = " (eval.co_adapt=released tests the authors' variant)" if has_trained_colearner(config) else ""
            console.note(f"CML-dagger is not tested: {refused}{hint}")
        if summary_file != folder.own_eval_file:
            console.note(f"Scores: {folder.eval_file}, kept as {summary_file}")
    return summary


def _score(
    config: RunConfig,
    plan: RunPlan,
    parts: Parts,
    world: World,
    console: Console,
    params: Params,
    what: str,
    stop: Callable[[], bool] | None,
    kept: Unfinished | None,
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
            learners=("meta",) if dagger_refusal(config) else ("meta", "co"),
            co_adapt=config.eval.co_adapt,
            norm=config.eval.norm,
            permutations=config.eval.permutations,
            dtype=parts.dtype,
            workers=config.domain.workers,
            progress=view.update,
            stop=stop,
            kept=kept,
        )


def _row(name: str, report: EvalReport) -> ResultRow:
    return ResultRow(name, report.mean, report.ci95, len(report.scores))
