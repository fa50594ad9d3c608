"""The test of a run: both learners on the fixed episodes of a split, beside the untrained network and chance."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from cml_dist.atomic import write_bytes, write_json
from cml_dist.config.methods import (
    dagger_refusal,
    has_trained_colearner,
    last_row_note,
    learner_title,
    method_title,
)
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.allocator import memory_explained
from cml_dist.distributed.world import World, joined_world
from cml_dist.errors import CheckpointError
from cml_dist.run.assemble import Parts, assemble
from cml_dist.run.centroid import TITLE, beside, in_words, is_compared, score_centroid
from cml_dist.run.checkpoint import Checkpoint, choose, on_all_ranks
from cml_dist.run.evaluator import EvalReport, evaluate
from cml_dist.run.features import keep_features
from cml_dist.run.fits import check_plot, draw_fits
from cml_dist.run.folder import NEUTRAL_KEYS, RunFolder, changes
from cml_dist.run.record import code_commit, versions
from cml_dist.run.status import now
from cml_dist.run.validation import best_lines
from cml_dist.telemetry.console import Console, ResultRow
from cml_dist.telemetry.text import interval, score, score_label
from cml_dist.types import Learner, Params

Reports = dict[Learner, EvalReport]


def evaluate_run(
    config: RunConfig, which: str, console: Console, plot: str | None = None, world: World | None = None
) -> dict[str, Any]:
    """Test a run's checkpoint by its configuration, see :func:`score_run`. Collective: all ranks."""
    with joined_world(config) if world is None else nullcontext(world) as world, memory_explained(world.device):
        return score_run(config, assemble(config, world, console, training=False), world, console, which, plot=plot)


def evaluate_sets(tests: Mapping[str, RunConfig], which: str, console: Console) -> None:
    """Test a run's checkpoint on several sets, each by its configuration, see :func:`score_run`; then show one table.

    All sets are looked at before the first test. Collective: all ranks.
    """
    first, *_ = tests.values()
    with joined_world(first) as world, memory_explained(world.device):
        parts = {place: assemble(config, world, console, training=False) for place, config in tests.items()}
        rows, name = [], next(iter(parts.values())).domain.score_name
        for place, config in tests.items():
            console.note(f"On {place}:")
            found = score_run(config, parts.pop(place), world, console, which)
            for learner, row in ((one, found[one]) for one in ("meta", "co") if one in found):
                numbers = score(name, row["mean"], 2), interval(name, row["ci95"], 2), row["episodes"]
                rows.append((place, learner_title(config, learner), *numbers, score(name, found["chance"], 2)))
    columns = ("set", "learner", score_label(name), "95 % interval", "episodes", "chance")
    title = f"{first.eval.split} splits, step {found['step']} ({found['chosen']})"
    console.table(title, columns, rows, least=("episodes", "chance"))


def overrides_of(config: RunConfig, parts: Parts, checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings by which figures under ``config`` are not the run's own, also where ``domain.root`` is of other data."""
    then, data = RunFolder(config.run.dir).read_config(), parts.domain.fingerprint()
    changed = {key: now for key, (_, now) in changes(then, config, NEUTRAL_KEYS).items()}
    if checkpoint.state.get("data", data) != data:
        changed["domain.root"] = getattr(config.domain, "root", None)
    return changed


def score_run(
    config: RunConfig,
    parts: Parts,
    world: World,
    console: Console,
    which: str = "best",
    stop: Callable[[], bool] = lambda: False,
    fence: Callable[[], None] = lambda: None,
    plot: str | None = None,
) -> dict[str, Any]:
    """Test a run's checkpoint, write summary and per-episode scores, and show the table.

    Each test is kept in ``evals/``, with its date, versions and the code's commit. ``eval.json`` and
    ``eval_scores.npz`` are of the newest in which settings and checkpoint were the run's own.

    Args:
        stop: asked before each episode: whether to break off, and raise Stopped on all ranks.
        fence: called by rank 0 right before it writes; an error that it raises calls it off.
        plot: a picture that rank 0 draws besides, see :func:`draw_fits`.

    Raises:
        CheckpointError: there is no checkpoint, or none that fits.

    Collective: all ranks.
    """
    if plot is not None:
        check_plot(plot, parts.domain, config.eval.split)
    folder = RunFolder(config.run.dir)
    world.heartbeat.beat("looking for a checkpoint")
    checkpoint, how = on_all_ranks(world, lambda warn: choose(folder.checkpoints, which, parts.net, warn), console.warn)
    if parts.kept is None:
        keep_features(config, parts.net, parts.domain, world, console, [config.eval.split], training=False)
    learners = ("meta",) if dagger_refusal(config) else ("meta", "co")
    parts.model.to(world.device)  # not while it trains: it would part gradients from the buckets that DDP reduces

    def test(members: Sequence[Params], what: str) -> Reports:
        params, *others = ({n: p.to(world.device, parts.dtype) for n, p in one.items()} for one in members)
        with console.progress(what, config.eval.episodes) as view:
            return evaluate(
                config, parts, world, params, learners, split=config.eval.split, num_episodes=config.eval.episodes,
                permutations=config.eval.permutations, others=others, on_grid=True, progress=view.update, stop=stop,
            )  # fmt: skip

    reports, together, floor = test([world.run_on_all_ranks(checkpoint.params)], "Testing"), {}, {}
    members = best_validations(config, parts, world, console) if how == "best" and config.eval.ensemble > 1 else []
    if members:
        params = [world.run_on_all_ranks(member.params) for member in members]
        together = test(params, f"Testing an ensemble of {len(members)}")
        del params
    if config.eval.untrained:
        floor = test([{n: p.detach() for n, p in parts.net.named_parameters()}], "Testing untrained")
    centroid, against = {}, {}
    if is_compared(config, parts):
        scored = score_centroid(config, parts, world, console, config.eval.split, config.eval.episodes, stop)
        centroid, against = {"meta": scored}, {one: beside(report, scored) for one, report in reports.items()}
    overrides = world.run_on_all_ranks(lambda: overrides_of(config, parts, checkpoint))
    summary: dict[str, Any] = {learner: report.summary() for learner, report in reports.items()}
    summary |= {
        "untrained": {learner: report.summary() for learner, report in floor.items()},
        **({"centroid": centroid["meta"].summary() | against} if centroid else {}),
        **({"ensemble": {one: report.summary() for one, report in together.items()}} if together else {}),
        **({"ensemble_steps": [member.step for member in members]} if together else {}),
        "chance": parts.domain.chance,
        "score": parts.domain.score_name,
        "split": config.eval.split,
        "step": checkpoint.step,
        "chosen": how,
        "overrides": overrides,
        "method": method_title(config),
        "inner_steps": parts.plan.test_inner_steps,
        "norm": config.eval.norm,
        "permutations": config.eval.permutations,
        "co_adapt": config.eval.co_adapt,
        "seed": config.eval.seed,
        "data": parts.domain.fingerprint(),
    }

    def write() -> None:
        asked = {**({} if which == "best" else {"checkpoint": which}), **overrides}
        made = {"time": now(), "versions": versions(), "commit": code_commit(), "checkpoint": checkpoint.sha256}
        scores = io.BytesIO()
        further = {"ensemble": together, "untrained": floor}
        named = reports | {f"{kind}_{one}": report for kind, own in further.items() for one, report in own.items()}
        if centroid:
            named["centroid"] = centroid["meta"]
        named |= {f"{name}_grid": report.grid for name, report in named.items() if report.grid is not None}
        np.savez(scores, **{name: report.scores.numpy() for name, report in named.items()})
        fence()
        kept = folder.new_eval_file(asked)
        for path in (kept.with_suffix(".npz"), *([] if asked else [folder.scores_file])):
            write_bytes(path, scores.getvalue())
        write_json(kept, summary | made)
        if not asked:
            write_json(folder.eval_file, summary)
        rows = {"{}": reports, f"{{}} (ensemble of {len(members)})": together, "untrained {}": floor}
        rows[TITLE] = centroid
        _show(config, parts, rows, console, title := f"{config.eval.split} split, step {checkpoint.step} ({how})")
        if centroid:
            console.note(in_words(config, against))
        if asked:
            own = f"; {folder.eval_file.name} stays that of the run's own settings" * folder.eval_file.is_file()
            console.note(f"Scores: {kept}{own}")
        if plot is not None:
            params = {n: p.to(world.device, parts.dtype) for n, p in checkpoint.params().items()}
            draw_fits(config, parts, params, learners, plot, f"{method_title(config)}, {title}")
            console.note(f"Picture: {plot}")

    world.run_on_main(write)
    return summary


def best_validations(config: RunConfig, parts: Parts, world: World, console: Console) -> list[Checkpoint]:
    """Checkpoints of the best ``eval.ensemble`` validations, the best first; a warning where fewer are there and whole.

    Collective: all ranks.
    """
    folder, found = RunFolder(config.run.dir).checkpoints, []
    newest, _ = on_all_ranks(world, lambda warn: choose(folder, "last", parts.net, warn), console.warn)
    for line in best_lines(newest.state)[: config.eval.ensemble]:

        def look(warn: Callable[[str], None], step: int = line["step"]) -> tuple[Checkpoint | None, str]:
            try:
                return choose(folder, str(step), parts.net, warn)
            except CheckpointError as error:
                warn(f"{error.what}: the ensemble goes without it")
                return None, ""

        member, _ = on_all_ranks(world, look, console.warn)
        found += [member] if member is not None else []
    if len(found) < config.eval.ensemble:
        kept = f"{len(found)} of these checkpoints were kept"
        console.warn(f"eval.ensemble is {config.eval.ensemble}, but {kept}; train with it set to keep as many")
    return found


def _show(config: RunConfig, parts: Parts, kinds: dict[str, Reports], console: Console, title: str) -> None:
    """The table of results, and what explains it; ``kinds`` of reports by what their rows are called."""
    reports = kinds["{}"]
    names = {learner: learner_title(config, learner) for learner in reports}
    named = [(kind.format(names[one]), report) for kind, own in kinds.items() for one, report in own.items()]
    rows = [report.row(name) for name, report in named]
    rows += [report.grid.row(f"{name}, on the grid") for name, report in named if report.grid is not None]
    if parts.domain.chance is not None:
        rows.append(ResultRow("chance", parts.domain.chance))
    console.results(rows, title=title, score_name=parts.domain.score_name)
    if config.eval.permutations > 1:
        spread = ", ".join(f"{names[one]} {r.summary()['label_order_sd']:.4f}" for one, r in reports.items())
        orders = config.eval.permutations
        console.note(f"Each episode under {orders} label orders; standard deviation over them: {spread}")
    if (note := last_row_note(config)) is not None:
        console.note(f"Inner {note}")
    refused = dagger_refusal(config)
    if config.method.colearner is not False and refused is not None:
        hint = " (eval.co_adapt=released tests the authors' variant)" if has_trained_colearner(config) else ""
        console.note(f"CML-dagger is not tested: {refused}{hint}")
