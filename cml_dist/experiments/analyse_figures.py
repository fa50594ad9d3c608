"""The pictures of ``cml-dist analyse``, and its numbers as JSON: several runs in one, with bands over seeds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cml_dist.config.methods import has_classes, has_trained_colearner
from cml_dist.experiments.analyse import FACTOR, FORMAT, Analysed, Measured
from cml_dist.experiments.cka import cka
from cml_dist.experiments.report_figures import (
    COLOURS,
    DASHES,
    INK,
    Picture,
    legend_below,
    log_where_wide,
    new_figure,
    saved,
)
from cml_dist.run.interval import estimate
from cml_dist.telemetry import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cml_dist.config.schema import RunConfig

MARKERS = "os^Dv<>P"
PANELS = 12
"""Layers that a picture has at most; of more it has so many, evenly."""

WHOSE = {"meta": "the meta-learner", "co": "its co-learner", "untrained": "an untrained co-learner"}


@dataclass(frozen=True)
class Group:
    """The runs of a variant, with what was found at their checkpoints by step."""

    number: int
    name: str
    runs: tuple[tuple[Analysed, dict[int, Measured]], ...]

    @property
    def title(self) -> str:
        """With its number, and of how many seeds it is."""
        return f"{self.number}  {self.name} ({counted(len(self.runs), 'seed')})"

    def over_training(self) -> Iterator[Measured]:
        """All that the pictures over training show."""
        return (found[step] for run, found in self.runs for step in run.steps)

    def best(self) -> list[Measured]:
        """Of each run at its best checkpoint."""
        return [found[run.best] for run, found in self.runs]

    def over(self, layers: Sequence[str]) -> Group:
        """With these layers, which other networks may have."""
        runs = ((run, {step: one.over(layers) for step, one in found.items()}) for run, found in self.runs)
        return replace(self, runs=tuple(runs))


@dataclass(frozen=True)
class Line:
    """A curve in each layer's panel.

    Attributes:
        hollow: its markers are: an untrained co-learner beside a trained one.
        steps: S meta-steps.
        middle, low, high: ``[S, L]``.
    """

    label: str
    number: int
    hollow: bool
    steps: list[int]
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray


def line(group: Group, label: str, values: Callable[[Measured], np.ndarray], hollow: bool = False) -> Line | None:
    """A variant's curve: the mean over seeds, with the least and most; of one seed those over meta-steps.

    Args:
        values: ``[n, L]`` of a checkpoint, averaged over n; None where all are NaN.
    """
    steps, rows = sorted({step for run, _ in group.runs for step in run.steps}), []
    if all(len(run.steps) == 1 for run, _ in group.runs):  # each its best one
        label, steps = f"{label}, step {', '.join(map(str, steps))}", steps[-1:]
    for step in steps:
        chosen = [(found, step if len(steps) > 1 else run.steps[0]) for run, found in group.runs]
        each = [values(found[at]) for found, at in chosen if at in found]
        each = each[0] if len(group.runs) == 1 else np.stack([_mean(one) for one in each])
        rows.append((_mean(each), each.min(0), each.max(0)))
    middle, low, high = (np.stack(part) for part in zip(*rows, strict=True))
    return None if np.isnan(middle).all() else Line(label, group.number, hollow, steps, middle, low, high)


def counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def positive(group: Group, learner: str) -> float:
    """The share of layers, checkpoints and meta-steps in which a co-learner's meta-gradient has a positive inner
    product with the meta-learner's; NaN where there is none."""
    cosines = np.concatenate([found.cosine(learner).flatten() for found in group.over_training()])
    cosines = cosines[~np.isnan(cosines)]
    return float((cosines > 0).mean()) if len(cosines) else math.nan


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, of what is not NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of all NaN
        return np.nanmean(values, axis=0)


# --------------------------------------------------------------------------- pictures


def draw(groups: Sequence[Group]) -> Iterator[Picture]:
    """All pictures for which there is something to draw; a layer that a network has not stays empty there."""
    layers = [*dict.fromkeys(layer for group in groups for layer in group.best()[0].layers)]
    groups = [group.over(layers) for group in groups]
    some = next(groups[0].over_training())
    found = [one for group in groups for one in group.over_training()]
    counts = {len(one.products) for one in found}
    sizes = {min(config.train.episodes_per_step, len(some.scores)) for config in _configs(groups)}
    band = "Band (or stroke): least to most over seeds; of one seed over meta-steps."
    steps = f"Mean over {_range(counts, 'meta-step')} of {_range(sizes, 'training episode')}. {band}"

    def lines(learners: Sequence[str], what: str, share: bool = False) -> list[Line]:
        found = []
        for learner, group in ((learner, group) for group in groups for learner in learners):
            shown = f"; > 0 in {positive(group, learner):.0%}" if share else ""
            values = lambda one, learner=learner: getattr(one, what)(learner)  # noqa: E731
            beside = learner == "untrained" and has_trained_colearner(group.runs[0][0].config)
            found.append(line(group, f"{group.title}, {WHOSE[learner]}{shown}", values, beside))
        return [one for one in found if one is not None]

    if cosines := lines(("co", "untrained"), "cosine", share=True):
        caption = "Above 0 a small step along both lowers both learners' losses (the paper's condition, by layer). "
        caption += f"{steps} Shares: of layers, checkpoints and meta-steps."
        title = "Cosine of the co-learner's and the meta-learner's meta-gradients"
        yield _panels("gradient-cosine", title, caption, "cosine", cosines, layers, zero=True)
    for name, whose, learners in (
        ("gradient-norm-meta", "meta-learner", ("meta",)), ("gradient-norm-co", "co-learner", ("co", "untrained"))
    ):  # fmt: skip
        if norms := lines(learners, "norm"):
            gamma = ", without gamma" * (whose == "co-learner")
            caption = f"L2 norm in each layer{gamma}; neither way is better. {steps}"
            title = f"Norm of the {whose}'s meta-gradient"
            yield _panels(name, title, caption, "norm", norms, layers, log=True)
    alike = [line(group, group.title, lambda one: cka(one.alike)[None]) for group in groups]
    if alike := [one for one in alike if one is not None]:
        caption = "1: adaptation leaves a layer's features as they are; lower: it changes them; neither way is better. "
        caption += f"Query sets of {_tested(groups)} (debiased, minibatch). "
        caption += "Band (or stroke): least to most over seeds."
        yield _panels("cka", "CKA of features before and after adaptation", caption, "CKA", alike, layers)
    yield _over_inner_steps(groups)


def _configs(groups: Sequence[Group]) -> list[RunConfig]:
    return [run.config for group in groups for run, _ in group.runs]


def _tested(groups: Sequence[Group]) -> str:
    """What the best checkpoints were looked at on."""
    splits = dict.fromkeys(config.eval.split for config in _configs(groups))
    return f"{len(groups[0].best()[0].scores)} {' or '.join(splits)} episodes"


def _range(counts: Collection[int], word: str) -> str:
    least = f"{min(counts)} to " * (min(counts) < max(counts))
    return least + counted(max(counts), word)


def _look(number: int, hollow: bool = False) -> dict[str, Any]:
    """Of a variant's curve, in all pictures: it can be told from others without colours."""
    at, colour = number - 1, COLOURS[(number - 1) % len(COLOURS)]
    dashes = DASHES[(at + at // len(COLOURS)) % len(DASHES)]  # others where colours and markers begin again
    look = {"color": colour, "linestyle": dashes, "marker": MARKERS[at % len(MARKERS)]}
    return {**look, "markersize": 4, "markerfacecolor": "white" if hollow else colour}


def _panels(
    name: str, title: str, caption: str, axis: str, lines: Sequence[Line], layers: Sequence[str], *,
    log: bool = False, zero: bool = False,
) -> Picture:  # fmt: skip
    """A panel a layer over meta-steps; where there is one checkpoint of each, one panel over layers."""
    drawn = [place for place in range(len(layers)) if any(not np.isnan(one.middle[:, place]).all() for one in lines)]
    if len(drawn) > PANELS:
        caption += f" {PANELS} of {len(drawn)} layers."
        drawn = [drawn[round(place)] for place in np.linspace(0, len(drawn) - 1, PANELS)]
    ends = np.concatenate([part.flatten() for one in lines for part in (one.low, one.high)])
    wide = ends[ends > 0].tolist() if log else []
    if all(len(one.steps) == 1 for one in lines):
        with new_figure(size=(6.4, 3.6)) as (figure, axes):
            for one in lines:
                middle, low, high = (part[0, drawn] for part in (one.middle, one.low, one.high))
                spread = np.maximum([middle - low, high - middle], 0)
                look = _look(one.number, one.hollow)
                axes.errorbar(range(len(drawn)), middle, spread, capsize=3, label=one.label, **look)
            axes.set_xticks(range(len(drawn)), [layers[k] for k in drawn], rotation=30 * (len(drawn) > 6))
            axes.set(xlabel="layer", ylabel=axis)
            _finish_axes(axes, wide, zero)
            return _finish(figure, axes, name, title, caption)
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    size = (max(6.4, 2.2 * columns), 0.6 + 2.0 * rows)
    with new_figure(rows, columns, size=size, sharey=True, squeeze=False) as (figure, grid):
        for panel, layer in zip(grid.flat, drawn, strict=False):
            for one in lines:
                look = _look(one.number, one.hollow)
                band = one.low[:, layer], one.high[:, layer]
                panel.fill_between(one.steps, *band, color=look["color"], alpha=0.15, linewidth=0)
                panel.plot(one.steps, one.middle[:, layer], linewidth=1.4, label=one.label, **look)
            panel.set_title(layers[layer])
            panel.locator_params(axis="x", nbins=4)
            _finish_axes(panel, wide, zero)
        for place, panel in enumerate(grid.flat):
            if len(drawn) - columns <= place < len(drawn):  # the lowest of each column
                panel.set_xlabel("meta-step")
            if place % columns == 0:
                panel.set_ylabel(axis)
            if place >= len(drawn):
                panel.set_axis_off()
        return _finish(figure, grid.flat[0], name, title, caption)


def _over_inner_steps(groups: Sequence[Group]) -> Picture:
    """The score of the best checkpoints after each inner step."""
    title, axis, scale, ways = "MSE", "MSE, lower is better", 1, set()
    if has_classes(groups[0].runs[0][0].config):
        title, axis, scale = "Accuracy", "accuracy (%), higher is better", 100
        ways = {config.domain.ways for config in _configs(groups)}
    caption = f"{_tested(groups)}, the best checkpoint of each run (by validation, else the newest)"
    caption += ". Strokes: 95 % intervals over episodes, of the mean over seeds. "
    caption += "Bands: least to most over seeds. " * any(len(group.runs) > 1 for group in groups)
    caption += "Dotted: the run's own inner steps."
    with new_figure(size=(6.4, 3.6)) as (figure, axes):
        for place, group in enumerate(groups):
            each = scale * np.stack([one.scores for one in group.best()])
            scores = each.mean(0)
            found = [estimate(column) for column in scores.T if not np.isnan(column).any()]
            middle, half = [one.mean for one in found], np.nan_to_num([one.ci95 for one in found])
            look, seeds = _look(group.number), each.mean(1)[:, : len(found)]
            # Beside each other, so that intervals can be seen.
            at = np.arange(len(found)) + 0.04 * (place - (len(groups) - 1) / 2) * max(1, len(found) / 10)
            axes.fill_between(at, seeds.min(0), seeds.max(0), color=look["color"], alpha=0.15, linewidth=0)
            axes.errorbar(at, middle, half, capsize=2, linewidth=1.4, label=group.title, **look)
            axes.axvline((scores.shape[1] - 1) // FACTOR, color=INK, linestyle=":", linewidth=0.8)
        if len(ways) == 1:
            axes.axhline(100 / ways.pop(), color="0.5", linewidth=0.8, label="chance")
        axes.set(xlabel="inner steps", ylabel=axis)
        axes.xaxis.get_major_locator().set_params(integer=True)
        return _finish(figure, axes, "inner-steps", f"{title} against inner steps at test", caption)


def _finish_axes(axes: Axes, wide: Sequence[float], zero: bool) -> None:
    if wide:
        log_where_wide(axes, "y", wide)
    if zero:
        axes.axhline(0, color=INK, linewidth=0.8)


def _finish(figure: Figure, axes: Axes, name: str, title: str, caption: str) -> Picture:
    """The title above, caption and legend below."""
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=9, fontweight="bold")
    legend_below(figure, axes, int(14 * figure.get_figwidth()), caption)
    return Picture(name, *(saved(figure, kind, name) for kind in ("svg", "png")))


# --------------------------------------------------------------------------- numbers


def numbers(groups: Sequence[Group], episodes: int, notes: Sequence[str]) -> dict[str, Any]:
    """All that pictures show, and each seed by itself, as JSON; null where there is nothing."""
    runs = []
    for variant in groups:
        for run, found in variant.runs:
            each = [_of_checkpoint(step, found[step]) for step in sorted(found)]
            known = {"run": run.folder, "variant": variant.name, "seed": run.seed, "best": run.best}
            runs.append({**known, "over_training": list(run.steps), "checkpoints": each})
    shares = {group.name: {who: _plain(positive(group, who)) for who in ("co", "untrained")} for group in groups}
    layers = next(groups[0].over_training()).layers
    head = {"format": FORMAT, "episodes": episodes, "layers": list(layers), "notes": list(notes)}
    return {**head, "positive_share": shares, "runs": runs}


def _of_checkpoint(step: int, one: Measured) -> dict[str, Any]:
    shown: dict[str, Any] = {"step": step}
    shown["cosine"] = {who: _plain(_mean(one.cosine(who))) for who in ("co", "untrained")}
    shown["norm"] = {who: _plain(_mean(one.norm(who))) for who in WHOSE}
    shown["cka"] = _plain(cka(one.alike))
    found = [estimate(column) for column in one.scores.T]
    return {**shown, "scores": _plain([e.mean for e in found]), "scores_ci95": _plain([e.ci95 for e in found])}


def _plain(values: Any) -> Any:
    """For JSON: None for what is not finite, and for a list of nothing else."""
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    found = [_plain(float(value)) for value in values]
    return found if any(value is not None for value in found) else None


def table(groups: Sequence[Group]) -> tuple[str, tuple[str, ...], list[tuple[Any, ...]]]:
    """Title, columns and rows of what is shown on the screen."""
    score = "accuracy" if has_classes(groups[0].runs[0][0].config) else "mse"
    columns = ("variant", "seeds", "cosine > 0", "untrained > 0", "CKA of the last layer", f"test {score}")
    rows = []
    for group in groups:
        shares = [text.score("accuracy", positive(group, who)) for who in ("co", "untrained")]
        alike = [float(values[-1]) for values in (cka(one.alike) for one in group.best())]
        tested = [float(one.scores[:, (one.scores.shape[1] - 1) // FACTOR].mean()) for one in group.best()]
        last = text.number(float(np.mean(alike)), 3), text.score(score, float(np.mean(tested)))
        rows.append((f"{group.number}  {group.name}", len(group.runs), *shares, *last))
    title = "Layers, checkpoints and meta-steps with a positive cosine; CKA and score at the best checkpoints"
    return title, columns, rows
