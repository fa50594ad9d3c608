"""What ``cml-dist report`` puts on its page: runs, finished or not, by variant, and those of one test compared."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from cml_dist.config.keys import as_yaml
from cml_dist.config.methods import has_classes, method_title
from cml_dist.errors import CmlError, ConfigError
from cml_dist.experiments.compare import (
    Comparison,
    TestedRun,
    by_variant,
    compare,
    differing,
    open_run,
    tested_run,
    variant_names,
    variant_settings,
)
from cml_dist.run.folder import RunFolder
from cml_dist.run.status import read_status
from cml_dist.telemetry.metrics import read_metrics

POINTS = 200
"""Of a curve over the whole run at most: each is the mean over as many meta-steps."""

ROSE = 1.5
"""A run has diverged whose loss at its end (a tenth of its steps) is so many times that at its beginning."""

LARGEST = 1e15
"""Values and steps beyond, and what is not finite, are not drawn."""

Curve = dict[int, float]
"""Values by meta-step."""


@dataclass(frozen=True)
class ShownRun:
    """A run's folder in figures.

    Attributes:
        settings: flat, those that make a variant.
        method: as tables name it.
        score: ``accuracy`` or ``mse``.
        state: of ``status.json``; ``unknown`` without one.
        curves: ``validation``, ``score``, ``loss`` and ``gradient_cosine``, those that were recorded.
        halves: half widths of the validations' 95 % intervals over episodes.
        parameters: that the network has without its co-learner; None: not recorded.
        tested: None where it cannot be compared.
        warnings: what is to be said of it.
    """

    folder: str
    seed: int
    settings: dict[str, Any]
    method: str
    score: str
    state: str
    curves: dict[str, Curve]
    halves: Curve
    parameters: int | None
    tested: TestedRun | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ShownVariant:
    """Runs that differ in their seed alone, with the number that it has in figures, from 1."""

    number: int
    name: str
    runs: tuple[ShownRun, ...]

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    def band(self, key: str) -> tuple[list[int], list[float], list[float], list[float]]:
        """Steps, mean over seeds, and least and most; of one seed's validations the interval over episodes."""
        curves = [run.curves[key] for run in self.runs if key in run.curves]
        steps = sorted({step for curve in curves for step in curve})
        values = [[curve[step] for curve in curves if step in curve] for step in steps]
        halves = self.runs[0].halves if key == "validation" and len(self.runs) == 1 else {}
        low = [min(each) - halves.get(step, 0.0) for step, each in zip(steps, values, strict=True)]
        high = [max(each) + halves.get(step, 0.0) for step, each in zip(steps, values, strict=True)]
        return steps, [math.fsum(each) / len(each) for each in values], low, high


@dataclass(frozen=True)
class Shown:
    """All of a page.

    Attributes:
        variants: in the order of their numbers.
        differing: the settings in which they differ.
        comparisons: of the runs of each test, the largest first, with what it is that tests differ in.
        warnings: a line each.
    """

    score: str
    variants: tuple[ShownVariant, ...]
    differing: tuple[str, ...]
    comparisons: tuple[tuple[str, Comparison], ...]
    warnings: tuple[str, ...]

    def variant_of(self, run: TestedRun) -> ShownVariant:
        return next(v for v in self.variants for one in v.runs if one.tested is run)


def read_shown(folders: Iterable[str], baseline: str | None = None) -> Shown:
    """Read run folders, and compare those that can be.

    Args:
        baseline: as of :func:`cml_dist.experiments.compare.compare`; its own default where a test has none of it.

    Raises:
        ConfigError: there is no run, or nothing is the baseline.
    """
    runs, warnings = [], []
    for folder in folders:
        try:
            runs.append(_read(folder))
        except CmlError as error:
            warnings.append(f"Left out: {error.what}")
    if not runs:
        raise ConfigError("there is no run to report" + "".join(f"; {line}" for line in warnings), "name run folders")
    (score, _), *others = Counter(run.score for run in runs).most_common()
    if others:
        warnings += [f"Left out: {run.folder} is scored by {run.score}" for run in runs if run.score != score]
        runs = [run for run in runs if run.score == score]
    warnings += [warning for run in runs for warning in run.warnings]
    found = _comparisons(runs, baseline)
    for title, each in found:
        warnings += [f"{title}: {note}" if len(found) > 1 else note for note in each.notes if "one seed" not in note]
    if len(found) > 1:
        warnings.append(f"These runs are of {len(found)} tests, of other episodes each: compared within a test alone")
    groups, left_out = by_variant(sorted(runs, key=_in_order(found)))
    warnings += [note for note in left_out if not any(note in warning for warning in warnings)]
    names = variant_names([group[0].settings for group in groups], groups[0][0].method)
    made = zip(names, groups, strict=True)
    variants = tuple(ShownVariant(n, name, group) for n, (name, group) in enumerate(made, start=1))
    if alone := [str(v.number) for v in variants if len(v.runs) == 1]:
        shown = "all variants" if len(alone) == len(variants) else f"variant{'s' * (len(alone) > 1)} {', '.join(alone)}"
        warnings.append(f"One seed only, and so no interval over seeds: {shown} (train again with run.seed=1, 2, ...)")
    keys = tuple(differing([v.settings for v in variants]))
    return Shown(score, variants, keys, tuple(found), tuple(warnings))


def _read(path: str) -> ShownRun:
    """A run's folder; CmlError where its configuration cannot be read."""
    folder, config = open_run(path)
    status, metrics = read_status(folder.status_file), read_metrics(folder.metrics_file)
    score = "accuracy" if has_classes(config) else "mse"
    width = -(-config.train.steps // POINTS)
    keys = {"score": score, "loss": "loss", "gradient_cosine": "gradient_cosine"}
    curves = {name: _curve(metrics, key, width) for name, key in keys.items()}
    validations = read_metrics(folder.validation_file)
    curves["validation"] = _curve(validations, "mean")
    warnings, tested = [], None
    try:
        tested = tested_run(folder, config, metrics)
        if not np.isfinite(tested.scores).all():
            warnings.append(f"{path} has diverged: test scores are not finite")
    except CmlError as error:
        step = f", step {status.step:,} of {status.steps:,}" if status and status.state != "finished" else ""
        reason = f": {status.reason}" if status and status.state in ("failed", "stopped") and status.reason else ""
        warnings.append(f"Not in the tables: {error.what}{step}{reason}")
    if skipped := sum(line.get("skipped") is True for line in metrics):
        warnings.append(f"{path} skipped meta-steps for NaN or infinity in the meta-gradient: {skipped:,}")
    losses = [*curves["loss"].values()]
    if tenth := len(losses) // 10:
        first, last = (math.fsum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
        if last > ROSE * first > 0:
            warnings.append(f"{path} has diverged: its loss rose from {first:.3g} to {last:.3g}")
    return ShownRun(
        folder=str(folder.path),
        seed=config.run.seed,
        settings=variant_settings(folder, config),
        method=method_title(config),
        score=score,
        state=status.state if status else "unknown",
        curves={name: curve for name, curve in curves.items() if curve},
        halves=_curve(validations, "ci95"),
        parameters=_parameters(folder),
        tested=tested,
        warnings=tuple(warnings),
    )


def _curve(records: Sequence[dict[str, Any]], key: str, width: int = 1) -> Curve:
    """Means over ``width`` steps each, by the last of them; of values that can be drawn."""
    found: dict[int, list[float]] = {}
    for record in records:
        value = record.get(key)
        if isinstance(value, (int, float)) and abs(value) < LARGEST and 0 <= record["step"] < LARGEST:
            found.setdefault(-(-record["step"] // width) * width, []).append(value)
    return {step: math.fsum(values) / len(values) for step, values in sorted(found.items())}


def _parameters(folder: RunFolder) -> int | None:
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        *_, last = folder.sessions_file.read_text(encoding="utf-8").splitlines()
        counts = json.loads(last)["parameters"]
        return int(sum(count for part, count in counts.items() if part != "colearner"))
    return None


def _comparisons(runs: Sequence[ShownRun], baseline: str | None) -> list[tuple[str, Comparison]]:
    """Of the runs of each test, the largest first."""
    tests: dict[str, list[TestedRun]] = {}
    for run in runs:
        if run.tested is not None:
            tests.setdefault(json.dumps(run.tested.episodes, sort_keys=True), []).append(run.tested)
    groups = sorted(tests.values(), key=len, reverse=True)
    every = [group[0].episodes for group in groups]
    keys = [key for key in dict.fromkeys(k for one in every for k in one) if len({str(o.get(key)) for o in every}) > 1]
    found, refusals = [], []
    for group in groups:
        title = ", ".join(f"{key.removeprefix('domain.')}={as_yaml(group[0].episodes.get(key))}" for key in keys)
        try:
            each = compare(group, baseline)
        except ConfigError as error:  # nothing is the baseline: runs of one test are alike in all else
            refusals.append(error)
            each = compare(group)
        found.append((title, each))
    if refusals and len(refusals) == len(groups):
        raise refusals[0]
    return found


def _in_order(found: Sequence[tuple[str, Comparison]]) -> Any:
    """Sorts runs as comparisons have them, the first baseline first; then those that are in none."""
    ranks = [os.path.realpath(run.folder) for _, each in found for variant in each.variants for run in variant.runs]
    place = {folder: rank for rank, folder in reversed([*enumerate(ranks)])}
    return lambda run: place.get(os.path.realpath(run.folder), len(ranks))
