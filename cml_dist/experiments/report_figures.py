"""The figures of ``cml-dist report``: each as SVG for the page, and as SVG and PNG with a legend."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cml_dist.atomic import write_bytes
from cml_dist.experiments.compare import Variant, variant_names
from cml_dist.experiments.report_runs import Shown, ShownVariant
from cml_dist.telemetry import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RIGHT, WRONG = "#1d2733", "#13733e", "#b3261e"
COLOURS = ("#1f5fae", "#b3460b", "#13733e", "#a3195b", "#6a3fb5", "#6b5d00", "#006d77", "#4d4d4d")
DASHES = ("-", "--", "-.", ":")
"""Colours begin again with the next of these."""

SIZE = 4.8, 3.2
"""Inches: as wide as a telephone, where text keeps its size."""

LOOK = {
    "font.size": 9, "axes.titlesize": 9, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e3e6ea", "axes.axisbelow": True, "svg.fonttype": "none",
    "text.parse_math": False, "axes.formatter.use_mathtext": False, "legend.frameon": False,
}  # fmt: skip

BACKBONE = ("model.backbone", "model.filters", "model.hidden", "model.extra_blocks", "model.options")
"""What makes its size."""


@dataclass(frozen=True)
class Picture:
    """A figure as files, with a legend, and their name."""

    name: str
    svg: bytes
    png: bytes

    def write(self, folder: Path, prefix: str = "") -> None:
        """Its files, each whole or not at all."""
        for kind, content in (("svg", self.svg), ("png", self.png)):
            write_bytes(folder / f"{prefix}{self.name}.{kind}", content)


@dataclass(frozen=True)
class Drawn(Picture):
    """A figure of a page.

    Attributes:
        inline: an SVG element, without a legend.
        zoom: of curves, left, top, right and bottom of the axes in the SVG, and the limits there of x and y.
    """

    title: str
    caption: str
    inline: str
    zoom: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Fit:
    """An episode of regression: its curve on ``x``, the support points, and answers by a variant's number."""

    index: int
    x: np.ndarray
    truth: np.ndarray
    support: tuple[np.ndarray, np.ndarray]
    answers: dict[int, np.ndarray]


def style(number: int) -> dict[str, Any]:
    """Colour and dashes of a variant."""
    return {"color": COLOURS[(number - 1) % len(COLOURS)], "linestyle": DASHES[(number - 1) // len(COLOURS) % 4]}


def draw_all(shown: Shown) -> Iterator[Drawn]:
    """The figures for which something was recorded."""
    label, scale = (f"{shown.score} (%)", 100) if shown.score == "accuracy" else ("MSE", 1)
    seeds = "Band: least to most over seeds"
    for key, title, axis, by, caption in (
        ("validation", "Validation", label, scale, f"{seeds}; of one seed, 95 % over the validation's episodes."),
        ("score", f"Training {label.removesuffix(' (%)')}", label, scale, f"Of the query sets. {seeds}."),
        ("loss", "Training loss", "loss", 1, f"What is minimised, with the co-learner's part. {seeds}."),
        ("gradient_cosine", "Gradient cosine", "cosine", 1,
         f"On the body, of the co-learner's and the meta-learner's gradients. {seeds}."),
    ):  # fmt: skip
        if any(key in run.curves for variant in shown.variants for run in variant.runs):
            yield _curves(shown, key, title, axis, by, caption)
    tested = [(shown.variant_of(v.runs[0]), v) for _, found in shown.comparisons for v in found.variants]
    if tested:
        yield _costs(tested, label, scale)
        shots = [(variant, v, variant.settings.get("domain.shots")) for variant, v in tested]
        sizes = [(variant, v, variant.runs[0].parameters) for variant, v in tested]
        of_size = [key for key in shown.differing if key.startswith(BACKBONE)]
        for name, over, points, free in (
            ("shots", "shots", shots, ["domain.shots"]), ("backbone", "parameters", sizes, of_size)
        ):  # fmt: skip
            if len({x for *_, x in points if x is not None}) > 1 and set(free) & set(shown.differing):
                yield _over(name, over, points, free, label, scale)


def _curves(shown: Shown, key: str, title: str, axis: str, scale: float, caption: str) -> Drawn:
    with new_figure() as (figure, axes):
        every = []
        for variant in shown.variants:
            steps, *values = variant.band(key)
            if not steps:
                continue
            mean, low, high = (np.array(each) * scale for each in values)
            look, gid = style(variant.number), f"curve-{key}-{variant.number}"
            one = {"marker": "o", "markersize": 4} if len(steps) == 1 else {}
            if (high > low).any():
                band = axes.fill_between(steps, low, high, color=look["color"], alpha=0.16, linewidth=0)
                band.set_gid(f"{gid}-band")
            axes.plot(steps, mean, **look, **one, linewidth=1.6, gid=gid, label=f"{variant.number}  {variant.name}")
            every += [low, high]
        axes.set(xlabel="meta-step", ylabel=axis, ylim=_limits(np.concatenate(every)))
        return drawn(figure, axes, key.replace("_", "-"), title, caption, legend=True, zoom=True)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Of the axis: all values, but for a few that would press the others flat."""
    low, high = values.min(), values.max()
    inner_low, inner_high = np.percentile(values, [2, 98])
    if high - low > 4 * (inner_high - inner_low) > 0:
        low, high = inner_low, inner_high
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _costs(tested: Sequence[tuple[ShownVariant, Variant]], label: str, scale: float) -> Drawn:
    """A row a variant: its test score with the interval over episodes and a point a seed, and what it cost."""
    height = max(SIZE[1] / 2, 0.9 + 0.17 * len(tested))
    with new_figure(1, 3, size=(SIZE[0], height), sharey=True) as (figure, (scores, seconds, memory)):
        rows = range(len(tested))
        for row, (variant, v) in enumerate(tested):
            colour = style(variant.number)["color"]
            half = np.nan_to_num(scale * v.over_episodes.ci95)
            look, named = {"color": colour, "markersize": 4, "capsize": 3}, f"{variant.number}  {variant.name}"
            scores.errorbar(scale * v.over_episodes.mean, row, xerr=half, fmt="D", **look, label=named)
            points = [scale * run.scores.mean() for run in v.runs]
            scores.plot(points, [row] * len(points), "|", color=colour, markersize=7)
            seconds.barh(row, (v.seconds or 0) / 60, color=colour, height=0.6)
            memory.barh(row, v.peak_memory_gib or 0, color=colour, height=0.6)
        scores.set_yticks(rows, [str(variant.number) for variant, _ in tested])
        scores.invert_yaxis()
        scores.set(xlabel=label, title="test", ylabel="variant")
        seconds.set(xlabel="minutes", title="time")
        memory.set(xlabel="GiB", title="peak memory")
        for axes in (seconds, memory):
            axes.locator_params(axis="x", nbins=3)
        scores.locator_params(axis="x", nbins=4)
        caption = "Diamond: mean with its 95 % interval over episodes; strokes: seeds. Time: of all meta-steps."
        return drawn(figure, scores, "costs", "Score, time and memory", caption, legend=True)


def _over(
    name: str, over: str, points: Sequence[tuple[ShownVariant, Variant, Any]], free: Sequence[str], label: str,
    scale: float,
) -> Drawn:  # fmt: skip
    """Scores over what ``free`` sets, a line for variants that are alike in everything else."""
    lines: dict[str, list[tuple[float, Variant]]] = {}
    rest: dict[str, dict[str, Any]] = {}
    for variant, v, x in points:
        if x is not None:
            other = {key: value for key, value in variant.settings.items() if key not in free}
            rest[key := repr(other)] = other
            lines.setdefault(key, []).append((x, v))
    names = variant_names([*rest.values()], points[0][0].runs[0].method)
    with new_figure() as (figure, axes):
        for number, (named, line) in enumerate(zip(names, lines.values(), strict=True), start=1):
            line.sort(key=lambda point: point[0])
            means, halves = ([scale * getattr(v.over_episodes, of) for _, v in line] for of in ("mean", "ci95"))
            look = style(number)
            axes.errorbar(
                [x for x, _ in line], means, np.nan_to_num(halves), fmt="none", color=look["color"], capsize=3
            )
            axes.plot([x for x, _ in line], means, **look, marker="o", markersize=4, label=named)
        if name == "backbone":
            axes.set_xscale("log")
        ticks = sorted({x for line in lines.values() for x, _ in line})
        axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axes.minorticks_off()
        axes.set(xlabel=over, ylabel=f"test {label}")
        legend_below(figure, axes)
        title = f"{label.removesuffix(' (%)')} over {over}"
        return drawn(figure, axes, name, title[0].upper() + title[1:], "With 95 % intervals over episodes.")


def draw_fits(fits: Sequence[Fit], names: dict[int, str]) -> Drawn:
    """Curves of regression: the true one, the support points, and what adapted learners answer."""
    with new_figure(1, len(fits), sharey=True, squeeze=False) as (figure, (row,)):
        for fit, axes in zip(fits, row, strict=True):
            axes.plot(fit.x, fit.truth, color="0.75", linewidth=4, label="true curve")
            axes.plot(*fit.support, "o", color=INK, markersize=3, zorder=3, label="support points")
            for number, y in fit.answers.items():
                axes.plot(fit.x, y, **style(number), label=f"{number}  {names[number]}")
            axes.set(title=f"episode {fit.index}", xlabel="x")
        legend_below(figure, axes)
        caption = "After the inner steps of the test, on the first test episodes."
        return drawn(figure, axes, "fits", "Sample episodes", caption)


@contextmanager
def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = SIZE, **how: Any) -> Iterator[Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        yield figure, figure.subplots(rows, columns, **how)


def log_where_wide(axes: Axes, of: str, values: Sequence[float]) -> None:
    """A logarithmic axis, with numbers as people write them, where the values span more than a factor of 5.

    Two numbers at least are on it: a factor of 5 spans two of 1, 2, 5, 10, ..., and one of 100 two powers of ten.
    """
    if max(values) <= 5 * min(values):
        axes.locator_params(axis="both" if of == "xy" else of, nbins=5)
        return
    from matplotlib.ticker import LogLocator

    subs = (1, 2, 5) if max(values) < 100 * min(values) else (1,)
    for name in of:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.minorticks_off()


def legend_below(figure: Figure, axes: Axes, columns: int = 64, caption: str = "") -> None:
    """Below the axes, for which the figure grows; ``columns`` of text, with a caption above it."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [text.folded(text.line(label), columns, hang=4) for label in labels]
    said = text.folded(caption, columns) if caption else None
    lines = sum(label.count("\n") + 1 for label in (*labels, *([said] if said else [])))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.16 * (1 + lines))
    look = {"loc": "outside lower left", "fontsize": 8, "title_fontsize": 8, "alignment": "left", "handlelength": 3}
    figure.legend(handles, labels, title=said, **look)


def drawn(
    figure: Figure, axes: Axes, name: str, title: str, caption: str, legend: bool = False, zoom: bool = False
) -> Drawn:
    """``legend``: in the files alone: the page has one for all figures."""
    figure.draw_without_rendering()
    (width, height), box = 72 * figure.get_size_inches(), axes.get_position()
    corners = (box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height)
    view = (*corners, *axes.get_xlim(), *axes.get_ylim())
    inline = _inline(saved(figure, "svg", name), title)
    if legend:
        legend_below(figure, axes)
    svg, png = (saved(figure, kind, name) for kind in ("svg", "png"))
    return Drawn(name, svg, png, title, caption, inline, view if zoom else None)


def saved(figure: Figure, kind: str, name: str) -> bytes:
    import matplotlib

    made, how = io.BytesIO(), {"dpi": 200} if kind == "png" else {"dpi": 72, "metadata": {"Date": None}}
    with matplotlib.rc_context({"svg.hashsalt": name}):  # names within an SVG differ from those of other figures
        figure.savefig(made, format=kind, **how)
    return made.getvalue()


def _inline(svg: bytes, title: str) -> str:
    """An element of the page: as wide as its place, without names that other figures have too."""
    element = svg.decode()[svg.index(b"<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"<!--.*?-->\s*", "", element, flags=re.DOTALL)
    element = re.sub(r' id="[xy]tick_\d+"', ' class="tick"', element)
    element = re.sub(r' id="[\w.]+_\d+"', "", element)
    head, rest = element.split(">", 1)
    head = re.sub(r' (?:width|height|version|xmlns)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{title}">{rest}'
