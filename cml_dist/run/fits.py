"""``cml-dist eval RUN --plot FILE``: how a run's learners fit a few episodes, before adaptation and after it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cml_dist.atomic import write_bytes
from cml_dist.config.methods import learner_title
from cml_dist.config.schema import RunConfig
from cml_dist.data.base import Domain
from cml_dist.errors import ConfigError
from cml_dist.run.assemble import Parts
from cml_dist.run.evaluator import answers_of
from cml_dist.types import Learner, Params

STEPS = {0: ("before adaptation", ":"), 1: ("1 step", "--"), 10: ("10 steps", "-")}
COLOURS = {"meta": "#1f5fae", "co": "#d8712f"}


def check_plot(plot: str, domain: Domain, split: str) -> None:
    """Raise ConfigError where no picture can be drawn: the suffix is none of a picture, or episodes are no curves."""
    if Path(plot).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--plot is {plot}", "give a name that ends in .png, .pdf or .svg")
    if domain.grid(split, 0) is None:
        raise ConfigError("--plot draws fits of curves, and the episodes of this run are none", "leave it out")


def draw_fits(
    config: RunConfig, parts: Parts, params: Params, learners: Sequence[Learner], plot: str, title: str
) -> None:
    """Draw episodes 0 to 3: the curve, its support points, and the outputs before adaptation and after 1 and 10 steps.

    ``params`` lie on the device of ``parts.model``; the file ``plot`` is made or replaced.
    """
    from matplotlib.figure import Figure

    domain, problem, split = parts.domain, parts.model.problem, config.eval.split
    device, figure = next(iter(params.values())).device, Figure(figsize=(10, 7), layout="constrained")
    for index, axes in enumerate(figure.subplots(2, 2).flat):
        episode = domain.prepare(domain.episode(split, index), device, parts.dtype)
        grid = domain.prepared_grid(split, index, device, parts.dtype)
        x = grid.inputs.cpu()
        axes.plot(x, grid.targets.cpu(), color="0.75", linewidth=4, label="true curve")
        support = episode.support.map(lambda values: values.cpu())
        axes.plot(support.inputs, support.targets, "ko", markersize=5, zorder=3, label="support points")
        for steps, (when, style) in STEPS.items():
            method = replace(parts.model.method, inner_steps=steps)
            how = config.eval.co_adapt, config.eval.norm
            for learner, (y,) in answers_of(params, episode, problem, method, learners, [grid], *how).items():
                axes.plot(x, y.cpu(), style, color=COLOURS[learner], label=f"{learner_title(config, learner)}, {when}")
        axes.set(title=f"episode {index}", xlabel="x", ylabel="y")
    figure.suptitle(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    made = io.BytesIO()
    figure.savefig(made, format=Path(plot).suffix[1:].lower(), dpi=110)
    write_bytes(Path(plot), made.getvalue())
