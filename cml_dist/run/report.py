"""The test of a run: both learners on the fixed episodes of a split, beside the untrained network and chance."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from cml_dist.atomic import write_bytes, write_json
from cml_dist.config.methods import dagger_refusal, has_trained_colearner, learner_title, method_title
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.world import World
from cml_dist.errors import CheckpointError
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.assemble import Parts
from cml_dist.run.checkpoint import Checkpoint, DamagedCheckpoint
from cml_dist.run.evaluator import EvalReport, evaluate
from cml_dist.run.folder import RunFolder
from cml_dist.telemetry.console import Console, ResultRow
from cml_dist.types import Params

Choice = tuple[Checkpoint, tuple[str, list[CheckpointError]]]
"""A verified checkpoint; how it was chosen (``best``, ``last`` or the step that was asked for), and the faults of
better or newer ones, which are damaged."""


def choose_checkpoint(folder: RunFolder, which: str = "best") -> Choice:
    """The checkpoint of the best validation (``best``), the newest (``last``), or of a step (its number).

    Where ``best`` has none (never validated, or damaged) it is the newest, which then is called ``last``.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    if which not in ("best", "last"):
        steps = checkpoints.steps_in(folder.checkpoints)
        if not which.isdigit() or int(which) not in steps:
            raise CheckpointError(
                f"{folder.path} keeps no checkpoint {which!r}", f"use best, last, or one of the steps {steps}"
            )
        return checkpoints.load(checkpoints.path_of(folder.checkpoints, int(which))), (which, [])
    newest, faults = checkpoints.load_newest(folder.checkpoints)
    if newest is None:
        raise CheckpointError(f"{folder.path} has no checkpoint yet", "train it first: cml-dist train")
    best = newest.state.get("best")
    if which == "best" and best is not None:
        if best["step"] == newest.step:
            return newest, ("best", faults)
        try:
            return checkpoints.load(checkpoints.path_of(folder.checkpoints, best["step"])), ("best", faults)
        except DamagedCheckpoint as error:
            faults.append(error)
    return newest, ("last", faults)


def warn_of_faults(choice: Choice, console: Console) -> None:
    """Warn of what was passed over."""
    checkpoint, (how, faults) = choice
    for fault in faults:
        console.warn(f"{fault.what}: step {checkpoint.step} is used ({how})")


def overrides_of(config: RunConfig, parts: Parts, folder: RunFolder, checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings by which figures under ``config`` are not the run's own, also where ``domain.root`` is of other data."""
    changed = folder.test_overrides(config)
    data = parts.domain.fingerprint()
    if checkpoint.state.get("data", data) != data:
        changed["domain.root"] = getattr(config.domain, "root", None)
    return changed


def score_run(
    config: RunConfig,
    parts: Parts,
    folder: RunFolder,
    world: World,
    console: Console,
    which: str = "best",
    stop: Callable[[], bool] = lambda: False,
    fence: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Test a run's checkpoint, write summary and per-episode scores, and show the table.

    ``eval.json`` and ``eval_scores.npz`` are of the newest test. Each is also kept in ``evals/``: as ``own`` where
    settings and checkpoint are the run's own, else named by what is not.

    Args:
        stop: asked before each episode: whether to break off, and raise Stopped on all ranks.
        fence: called by rank 0 right before it writes; an error that it raises calls it off.

    Raises:
        CheckpointError: there is no checkpoint, or none that fits.

    Collective: all ranks.
    """
    world.heartbeat.beat("looking for a checkpoint")
    choice = checkpoints.on_all_ranks(world, lambda: choose_checkpoint(folder, which))
    warn_of_faults(choice, console)
    checkpoint, (how, _) = choice
    world.run_on_all_ranks(lambda: checkpoints.check_same_run(checkpoint, parts.net))
    learners = ("meta",) if dagger_refusal(config) else ("meta", "co")
    parts.model.to(world.device)  # not while it trains: it would part gradients from the buckets that DDP reduces

    def test(params: Params, what: str) -> dict[str, EvalReport]:
        params = {n: p.to(world.device, parts.dtype) for n, p in params.items()}
        with console.progress(what, config.eval.episodes) as view:
            return evaluate(
                config, parts, world, params, learners, split=config.eval.split, num_episodes=config.eval.episodes,
                permutations=config.eval.permutations, progress=view.update, stop=stop,
            )  # fmt: skip

    reports, floor = test(world.run_on_all_ranks(checkpoint.params), "Testing"), {}
    if config.eval.untrained:
        floor = test({n: p.detach() for n, p in parts.net.named_parameters()}, "Testing untrained")
    summary: dict[str, Any] = {learner: report.summary() for learner, report in reports.items()}
    summary |= {
        "untrained": {learner: report.summary() for learner, report in floor.items()},
        "chance": parts.domain.chance,
        "score": parts.domain.score_name,
        "split": config.eval.split,
        "step": checkpoint.step,
        "chosen": how,
        "overrides": world.run_on_all_ranks(lambda: overrides_of(config, parts, folder, checkpoint)),
        "method": method_title(config),
        "inner_steps": parts.plan.test_inner_steps,
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
        fence()
        for path in (scores_file, folder.scores_file):
            write_bytes(path, scores.getvalue())
        for path in (summary_file, folder.eval_file):
            write_json(path, summary)

    world.run_on_main(write)
    if world.is_main:
        title = f"{config.eval.split} split, step {checkpoint.step} ({how})"
        _show(config, parts, reports, floor, console, title)
        if summary_file != folder.own_eval_file:
            console.note(f"Scores: {folder.eval_file}, kept as {summary_file}")
    return summary


def _show(
    config: RunConfig,
    parts: Parts,
    reports: dict[str, EvalReport],
    floor: dict[str, EvalReport],
    console: Console,
    title: str,
) -> None:
    """The table of results, and what explains it."""
    names = {learner: learner_title(config, learner) for learner in reports}
    rows = [_row(names[learner], report) for learner, report in reports.items()]
    rows += [_row(f"untrained {names[learner]}", report) for learner, report in floor.items()]
    if parts.domain.chance is not None:
        rows.append(ResultRow("chance", parts.domain.chance))
    console.results(rows, title=title, score_name=parts.domain.score_name)
    if config.eval.permutations > 1:
        spread = ", ".join(f"{names[one]} {r.summary()['label_order_sd']:.4f}" for one, r in reports.items())
        orders = config.eval.permutations
        console.note(f"Each episode under {orders} label orders; standard deviation over them: {spread}")
    refused = dagger_refusal(config)
    if config.method.colearner is not False and refused is not None:
        hint = " (eval.co_adapt=released tests the authors' variant)" if has_trained_colearner(config) else ""
        console.note(f"CML-dagger is not tested: {refused}{hint}")


def _row(name: str, report: EvalReport) -> ResultRow:
    return ResultRow(name, report.mean, report.ci95, len(report.scores))
