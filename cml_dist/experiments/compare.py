"""Runs beside each other on the same test episodes: paired differences, over episodes and over seeds.

:func:`compare` is a pure function of what :func:`read_run` found in the folders. No torch, but for runs of versions
whose ``eval.json`` did not have the checksum of the data.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from zipfile import BadZipFile

import numpy as np

from cml_dist.config.keys import as_yaml, flatten
from cml_dist.config.methods import method_title
from cml_dist.config.schema import AUTO, ImageSettings, MethodConfig, OptimConfig, RunConfig
from cml_dist.errors import CheckpointError, ConfigError
from cml_dist.registry import method_entry
from cml_dist.run.folder import NEUTRAL_KEYS, RunFolder, runs_in, same_everywhere
from cml_dist.run.interval import Estimate, estimate
from cml_dist.run.status import read_status
from cml_dist.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from cml_dist.types import Learner

UNNAMED_KEYS = (
    *(key for key in NEUTRAL_KEYS if key != "engine."),
    *("run.seed", "eval.untrained", "eval.ensemble", "domain.features"),
)
"""Settings in which runs of one variant may differ. Engines change no value, but seconds and memory."""

SAME_EPISODES = (
    *("domain.augment.", "domain.mean", "domain.std", "domain.statistics", "domain.size", "domain.features"),
    *("domain.memory_gib", "domain.workers", "domain.splits", "domain.batch"),
    *("domain.unlabelled", "domain.distractors"),
    *("domain.base", "domain.hops", "domain.cap", "domain.readout", "domain.adjacency", "domain.dropout"),
)
"""Settings of a domain with which test episodes stay the same examples."""

_DAMAGE = (OSError, EOFError, BadZipFile, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What records raise that somebody else wrote, or that were cut off."""


@dataclass(frozen=True)
class TestedRun:
    """What a finished run's folder says.

    Attributes:
        folder: as it was named.
        seed: ``run.seed``.
        settings: flat, those that make a variant.
        episodes: what the test episodes follow from, by setting.
        method: as tables name it.
        score: ``accuracy`` (0 to 1) or ``mse``.
        scores: ``[episodes]`` float64 of the learner that the run is about (``eval.learner``).
        validations: (step, mean) of each, oldest first.
        seconds: of all meta-steps; without validations and the test.
        peak_memory_gib: largest of any process; None: not recorded.
    """

    __test__ = False  # no class of tests, whatever pytest thinks of its name

    folder: str
    seed: int
    settings: dict[str, Any]
    episodes: dict[str, Any]
    method: str
    score: str
    scores: np.ndarray
    validations: tuple[tuple[int, float], ...] = ()
    seconds: float | None = None
    peak_memory_gib: float | None = None

    def steps_to(self, reach: float) -> int | None:
        """The first validated step with at least this part of the best validation's score; None: none was scored."""
        if not self.validations:
            return None
        lower = self.score == "mse"
        best = (min if lower else max)(mean for _, mean in self.validations)
        return next(s for s, mean in self.validations if (mean <= best / reach if lower else mean >= reach * best))

    @property
    def last_slope(self) -> float | None:
        """Of the validation's score per 1,000 meta-steps, by least squares over the last third of the validations.

        Far from 0 where training was too short to say what a method comes to. None: there are fewer than three.
        """
        last = self.validations[-max(3, len(self.validations) // 3) :]
        if len(last) < 3:
            return None
        steps, means = np.array(last).T
        return 1000 * float(np.polyfit(steps, means, 1)[0])


@dataclass(frozen=True)
class Difference:
    """Of a variant to the baseline, episode by episode.

    Attributes:
        seeds: those that both have; empty: the means over each one's own seeds are compared.
        over_episodes: of the mean over these seeds; of these very runs.
        over_seeds: of the means over episodes; of training anew, on these very episodes.
    """

    seeds: tuple[int, ...]
    over_episodes: Estimate
    over_seeds: Estimate


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone.

    Attributes:
        name: what differs from the other variants in its configuration.
        runs: by seed.
        over_episodes, over_seeds: its mean score.
        difference: to the baseline; None: this is it.
        seconds, steps_to_reach, last_slope: means over its runs; None: not recorded of all.
        peak_memory_gib: largest of its runs.
    """

    name: str
    runs: tuple[TestedRun, ...]
    over_episodes: Estimate
    over_seeds: Estimate
    difference: Difference | None
    seconds: float | None
    steps_to_reach: float | None
    last_slope: float | None
    peak_memory_gib: float | None


@dataclass(frozen=True)
class Comparison:
    """Variants on the same test episodes, the baseline first.

    Attributes:
        score: ``accuracy`` or ``mse``.
        split, episodes: of the test.
        reach: of the best validation's score, to which ``steps_to_reach`` counts.
        notes: what is to be said of it, a line each.
    """

    score: str
    split: str
    episodes: int
    reach: float
    variants: tuple[Variant, ...]
    notes: tuple[str, ...]


# --------------------------------------------------------------------------- reading


def find_runs(places: Iterable[str]) -> list[str]:
    """Run folders, each once: those named, and all below a folder that is none itself."""
    found: dict[str, str] = {}
    for place in places:
        for run in runs_in(place) or [place]:
            found.setdefault(os.path.realpath(run), run)
    return list(found.values())


def variant_settings(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """The settings, flat, that runs of one variant have alike; without those of sub-networks where there are none."""
    idle = UNNAMED_KEYS if config.method.augment else (*UNNAMED_KEYS, "method.augment_")
    found = {key: value for key, value in same_everywhere(config).items() if not key.startswith(idle)}
    if any(line.get("inner_lr") == AUTO for line in read_metrics(folder.sessions_file)):
        found["method.inner_lr"] = AUTO  # each seed may have chosen another one
    return found


def open_run(path: str) -> tuple[RunFolder, RunConfig]:
    """A run's folder and its configuration.

    Raises:
        CheckpointError: it is no run, or has one for each class split.
        ConfigError: its configuration cannot be read.
    """
    folder = RunFolder(path)
    folder.check_contained()
    config = folder.read_config()
    if config.all_splits:
        raise CheckpointError(f"{path} holds a run for each class split", "name the folders of one of them")
    return folder, config


def read_run(path: str, learner: Learner | None = None) -> TestedRun:
    """What a run's folder says of its own test.

    Args:
        learner: whose scores are taken; None: the one that the run is about (``eval.learner``).

    Raises:
        CheckpointError, ConfigError: as :func:`open_run` and :func:`tested_run`.
    """
    folder, config = open_run(path)
    return tested_run(folder, config, read_metrics(folder.metrics_file), learner)


def tested_run(
    folder: RunFolder, config: RunConfig, metrics: Sequence[dict[str, Any]], learner: Learner | None = None
) -> TestedRun:
    """A run by its own test, and by the lines of its ``metrics.jsonl``; ``learner`` as of :func:`read_run`.

    Raises:
        CheckpointError: it is not finished or not tested, or its records are damaged.
    """
    path, status = folder.path, read_status(folder.status_file)
    if status is None or status.state != "finished":
        raise CheckpointError(f"{path} is not finished ({status.state if status else 'no status.json'})", "resume it")
    if (test := folder.own_test()) is None:
        raise CheckpointError(f"{path} has no test ({folder.eval_file.name})", f"run cml-dist eval {path}")
    try:
        return _tested(folder, config, test, metrics, learner)
    except _DAMAGE as error:
        what = f"the test in {path} is damaged ({type(error).__name__}: {str(error)[:200]})"
        raise CheckpointError(what, f"run cml-dist eval {path}") from error


def _tested(
    folder: RunFolder, config: RunConfig, test: dict[str, Any], metrics: Sequence[dict[str, Any]], asked: Learner | None
) -> TestedRun:
    learner = asked or (config.eval.learner if config.eval.learner in test else "meta")
    with open(folder.scores_file, "rb") as opened, np.load(opened) as file:  # np.load leaves a torn one open
        scores = file[learner].astype(float, casting="safe").reshape(test[learner]["episodes"])
    if (told := test[learner]["mean"]) is not None and not math.isclose(told, scores.mean(), rel_tol=1e-9):
        raise ValueError(f"{folder.eval_file.name} and {folder.scores_file.name} are of two tests")
    settings = same_everywhere(config)
    episodes = {k: v for k, v in settings.items() if k.startswith("domain.") and not k.startswith(SAME_EPISODES)}
    if isinstance(config.domain, ImageSettings):
        del episodes["domain.name"]  # whatever the set is called, its checksum says which it is
    if (data := test.get("data")) is None:
        from cml_dist.run.checkpoint import newest_state

        data = newest_state(folder.checkpoints).get("data", "")
    episodes |= {"the data's checksum": data[:12], "eval.split": test["split"]}
    episodes |= {"eval.seed": test.get("seed", config.eval.seed), "eval.episodes": len(scores)}
    memory = [line["peak_memory_gib"] for line in metrics if line.get("peak_memory_gib") is not None]
    validated = ((line["step"], line["mean"]) for line in read_metrics(folder.validation_file))
    return TestedRun(
        folder=str(folder.path),
        seed=config.run.seed,
        settings=variant_settings(folder, config),
        episodes=episodes,
        method=method_title(config),
        score=test["score"],
        scores=scores,
        validations=tuple((step, float(mean)) for step, mean in validated if mean is not None),
        seconds=math.fsum(line.get("seconds") or 0.0 for line in metrics) or None,
        peak_memory_gib=max(memory, default=None),
    )


# --------------------------------------------------------------------------- comparing


class OfVariant(Protocol):
    """A run in its folder, with the settings that make a variant."""

    folder: str
    seed: int
    settings: dict[str, Any]


R = TypeVar("R", bound=OfVariant)


def by_variant(runs: Sequence[R]) -> tuple[list[tuple[R, ...]], list[str]]:
    """The runs of each variant, by seed; and which are left out, in words: there is one for each seed."""
    groups: dict[str, dict[int, R]] = {}
    left_out = []
    for run in runs:
        group = groups.setdefault(json.dumps(run.settings, sort_keys=True), {})
        if (first := group.setdefault(run.seed, run)) is not run:
            left_out.append(f"{run.folder} is left out: the variant and seed of {first.folder} again")
    return [tuple(group[seed] for seed in sorted(group)) for group in groups.values()], left_out


def compare(runs: Sequence[TestedRun], baseline: str | None = None, reach: float = 0.95) -> Comparison:
    """Put runs beside each other.

    Args:
        baseline: a variant's name, terms of it that no other variant has, or the folder of one of its runs; None: MAML,
            else the first without the co-learner, else the first.
        reach: part of the best validation's score, above 0 and at most 1.

    Raises:
        ConfigError: there are no runs, their test episodes differ (with in what), or nothing is the baseline.
    """
    if not runs:
        raise ConfigError("there is no finished and tested run to compare", "name the folders of such runs")
    for run in runs[1:]:
        _check_same_episodes(runs[0], run)
    variants, notes = by_variant(runs)
    names = variant_names([runs[0].settings for runs in variants], variants[0][0].method)
    base = _baseline(baseline, names, variants)
    order = sorted(range(len(variants)), key=lambda k: k != base)
    found = tuple(_variant(names[k], variants[k], None if k == base else variants[base], reach) for k in order)
    for variant in found:
        if variant.difference is not None and (alone := _unpaired(variant, found[0])):
            notes.append(alone)
    if len(found) == 1:
        notes.append("All runs are of one variant: there is nothing to compare it with")
    if any(len(variant.runs) == 1 for variant in found):
        notes.append("A variant of one seed has no interval over seeds: train it again with run.seed=1, 2, ...")
    return Comparison(runs[0].score, runs[0].episodes["eval.split"], len(runs[0].scores), reach, found, tuple(notes))


def _check_same_episodes(first: TestedRun, run: TestedRun) -> None:
    if differs := unlike(first.episodes | {"score": first.score}, run.episodes | {"score": run.score}):
        raise ConfigError(
            f"{run.folder} was tested on other episodes than {first.folder}: {'; '.join(differs)}",
            "compare runs of one test, or run them again with these settings alike",
        )


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what the other differs from the one, in words."""
    return [f"{k} is {other.get(k)}, there {one.get(k)}" for k in {**one, **other} if one.get(k) != other.get(k)]


def differing(each: Sequence[dict[str, Any]]) -> list[str]:
    """Settings of variants in which they differ, without what follows from a method's name in each of them."""
    keys = [key for key in {key: None for one in each for key in one} if len({str(one.get(key)) for one in each}) > 1]
    pairs = [(implied | one, implied) for one, implied in zip(each, map(_implied, each), strict=True)]
    keys = [key for key in keys if any(key not in implied or implied[key] != one[key] for one, implied in pairs)]
    return sorted(keys, key=lambda key: not key.startswith("method."))


def variant_names(each: Sequence[dict[str, Any]], alone: str) -> list[str]:
    """What differs: ``method.name=boil, inner_steps=5``; ``alone`` where nothing does."""
    if not (keys := differing(each)):
        return [alone] * len(each)
    return [", ".join(f"{short_key(key)}={as_yaml(one[key])}" for key in keys if key in one) for one in each]


def short_key(key: str) -> str:
    """A setting as variants' names have it."""
    return key if key == "method.name" else key.removeprefix("method.")


def _implied(settings: dict[str, Any]) -> dict[str, Any]:
    """What the method's name says of ``method.*`` and ``optim.*``, and the co-learner of its weight."""
    name = settings["method.name"]
    said = {"name": name, "colearner": settings["method.colearner"]}
    method, with_it = (MethodConfig.model_validate(one).model_dump(mode="json") for one in ({"name": name}, said))
    optim = OptimConfig.model_validate(dict(method_entry(name).optim)).model_dump(mode="json")
    found = flatten({"method": {**with_it, "colearner": method["colearner"]}, "optim": optim})
    return {key: value for key, value in found.items() if key != "method.name"}


def _baseline(asked: str | None, names: Sequence[str], variants: Sequence[tuple[TestedRun, ...]]) -> int:
    if asked is None:
        settings = [runs[0].settings for runs in variants]
        rank = [(one["method.colearner"] is not False, one["method.name"] != "maml") for one in settings]
        return rank.index(min(rank))
    place = os.path.realpath(asked)
    chosen = [k for k, runs in enumerate(variants) if place in (os.path.realpath(run.folder) for run in runs)]
    chosen = chosen or [k for k, name in enumerate(names) if name == asked]
    chosen = chosen or [k for k, name in enumerate(names) if _terms(asked) <= _terms(name)]
    if len(chosen) != 1:
        what = f"the baseline {asked!r} is {'none' if not chosen else f'{len(chosen)}'} of the variants"
        raise ConfigError(what, f"name one of: {'; '.join(names)}; or one of the run folders")
    return chosen[0]


def _terms(name: str) -> set[str]:
    return set(re.split(r",\s*(?=[\w.]+=)", name.strip()))


def _variant(name: str, runs: tuple[TestedRun, ...], baseline: tuple[TestedRun, ...] | None, reach: float) -> Variant:
    scores = np.stack([run.scores for run in runs])
    of_training = zip(*((run.seconds, run.steps_to(reach), run.last_slope) for run in runs), strict=True)
    memory = [run.peak_memory_gib for run in runs if run.peak_memory_gib is not None]
    return Variant(
        name, runs, estimate(scores.mean(0)), estimate(scores.mean(1)),
        None if baseline is None else _difference(runs, baseline),
        *(None if None in values else float(np.mean(values)) for values in of_training),
        max(memory, default=None),
    )  # fmt: skip


def _difference(runs: tuple[TestedRun, ...], baseline: tuple[TestedRun, ...]) -> Difference:
    ours, theirs = ({run.seed: run.scores for run in group} for group in (runs, baseline))
    if not (seeds := tuple(seed for seed in ours if seed in theirs)):
        apart = np.mean([*ours.values()], axis=0) - np.mean([*theirs.values()], axis=0)
        return Difference((), estimate(apart), Estimate(float(apart.mean())))
    apart = np.stack([ours[seed] - theirs[seed] for seed in seeds])
    return Difference(seeds, estimate(apart.mean(0)), estimate(apart.mean(1)))


def _unpaired(variant: Variant, baseline: Variant) -> str:
    """What is to be said of seeds that one of the two alone has."""
    ours, theirs = ({run.seed for run in one.runs} for one in (variant, baseline))
    if not (alone := ours ^ theirs):
        return ""
    if not variant.difference.seeds:
        return f"{variant.name} has no seed in common with the baseline: no interval over seeds"
    shown = ", ".join(map(str, sorted(alone)))
    return f"{variant.name}: the difference is of the common seeds, without {shown}"
