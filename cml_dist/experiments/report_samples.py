"""Sample episodes of ``cml-dist report``: what the baseline and the best variant answer on the first test episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cml_dist.config.load import silently
from cml_dist.data.base import Domain
from cml_dist.data.build import build_domain
from cml_dist.data.pixels import as_png
from cml_dist.errors import DataError
from cml_dist.experiments.compare import Comparison
from cml_dist.experiments.report_figures import Fit
from cml_dist.experiments.report_runs import Shown
from cml_dist.meta.rule import Method
from cml_dist.run.evaluator import answers_of
from cml_dist.run.folder import run_config
from cml_dist.run.predict import Learner, load
from cml_dist.run.trained import trained_inputs
from cml_dist.types import Batch, Episode

SUPPORT, QUERIES = 5, 3
"""Pictures of a class that are shown at most."""


@dataclass(frozen=True)
class Query:
    """A query picture (PNG), and the class that each learner took it for, by its variant's number."""

    picture: bytes
    answers: dict[int, int]


@dataclass(frozen=True)
class Sample:
    """An episode of pictures.

    Attributes:
        accuracies: on all its query pictures, by the variant's number.
        classes: by label, support pictures (PNG) and queries.
    """

    index: int
    accuracies: dict[int, float]
    classes: list[tuple[list[bytes], list[Query]]]


def sample_episodes(shown: Shown, found: Comparison, count: int) -> list[Sample] | list[Fit]:
    """The first ``count`` test episodes as the first seeds' exports of the baseline and the best variant answer them.

    As the test of the run has it, but for the learner: it is the meta-learner (eq. 8).

    Raises:
        CmlError: export or data are not at hand, or the episodes are neither pictures nor curves.
    """
    sign, finite = -1 if found.score == "mse" else 1, [v for v in found.variants if np.isfinite(v.over_episodes.mean)]
    best = max(finite or found.variants, key=lambda v: sign * v.over_episodes.mean)
    chosen = {shown.variant_of(v.runs[0]).number: v.runs[0].folder for v in (found.variants[0], best)}
    made = {number: _opened(folder) for number, folder in chosen.items()}
    return [_sample(made, found.split, index) for index in range(min(count, found.episodes))]


def _opened(folder: str) -> tuple[Learner, Domain, str]:
    """A run's learner, its data, and how norms are tested."""
    learner = load(folder)  # first: it imports no code that nobody has named, which the configuration may name too
    config = run_config(folder, [])
    seeds = {"train_seed": config.run.seed, "eval_seed": config.eval.seed}
    trained = trained_inputs(config, silently)
    domain = build_domain(config.domain, **seeds, splits=[config.eval.split], trained=trained)
    return learner, domain, config.eval.norm


def _sample(made: dict[int, tuple[Learner, Domain, str]], split: str, index: int) -> Sample | Fit:
    first = next(iter(made.values()))[1]
    raw, grid = first.episode(split, index), first.grid(split, index)
    is_picture = raw.support.inputs.dtype == torch.uint8 and raw.support.inputs.ndim == 4
    if grid is None and not is_picture:
        raise DataError("test episodes are neither pictures nor curves", "look at the tables")
    answers, accuracies = {}, {}
    for number, (learner, domain, norm) in made.items():
        device, dtype = torch.device("cpu"), torch.float32
        episode = domain.prepare(domain.episode(split, index), device, dtype)
        asked = episode.query if grid is None else domain.prepared_grid(split, index, device, dtype)
        answers[number] = _answers(learner, episode, asked, norm)
        if grid is None:
            accuracies[number] = domain.score(answers[number], episode.query.targets).item()
    if grid is not None:
        support = (raw.support.inputs.flatten().numpy(), raw.support.targets.flatten().numpy())
        curves = {number: values.flatten().numpy() for number, values in answers.items()}
        return Fit(index, grid.inputs.flatten().numpy(), grid.targets.flatten().numpy(), support, curves)
    return Sample(index, accuracies, _classes(raw, {n: values.argmax(1).tolist() for n, values in answers.items()}))


def _answers(learner: Learner, episode: Episode, asked: Batch, norm: str) -> torch.Tensor:
    method = Method(learner.description["inner_steps"], learner.rule, unlabelled=learner.unlabelled)
    return answers_of(learner.params, episode, learner.problem, method, ["meta"], [asked], norm=norm)["meta"][0]


def _classes(raw: Episode, answers: dict[int, Sequence[int]]) -> list[tuple[list[bytes], list[Query]]]:
    def png(batch: Batch, place: int) -> bytes:
        return as_png(batch.inputs[place].numpy()).data

    def places(batch: Batch, label: int, most: int) -> list[int]:
        return (batch.targets == label).nonzero().flatten().tolist()[:most]

    found = []
    for label in range(raw.ways):
        support = [png(raw.support, place) for place in places(raw.support, label, SUPPORT)]
        queries = [
            Query(png(raw.query, place), {number: labels[place] for number, labels in answers.items()})
            for place in places(raw.query, label, QUERIES)
        ]
        found.append((support, queries))
    return found
