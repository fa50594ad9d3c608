"""A table of the paper beside what was trained here: which rows can run, and what they found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.config.methods import dagger_refusal
from cml_dist.config.repro import Figure, Row
from cml_dist.config.schema import GraphNodesConfig, ImagesConfig, RunConfig
from cml_dist.config.sweep import Run
from cml_dist.errors import CmlError, ConfigError, DataError
from cml_dist.experiments.compare import UNNAMED_KEYS, Difference, Variant, compare, read_run
from cml_dist.experiments.compare_tables import Table, csv_text, interval, score_column, shown, slope
from cml_dist.experiments.sweep import Job
from cml_dist.experiments.verdict import Verdict, judge
from cml_dist.run.folder import changes
from cml_dist.telemetry import text
from cml_dist.tools.sources.known_splits import known_sets

if TYPE_CHECKING:
    from cml_dist.types import Learner

DAGGER = ", dagger"
"""Behind a row's name: its co-learner by eq. 9, of the same runs."""


# --------------------------------------------------------------------------- data


def check_data(config: RunConfig) -> str:
    """What is to be said of a row's data beside published figures, in words; empty: nothing.

    Raises:
        DataError: they are not there, damaged, or too few for an episode of this shape.
    """
    domain, root = config.domain, getattr(config.domain, "root", None)
    if root is None or "://" in root:
        return ""
    if isinstance(domain, GraphNodesConfig):
        from cml_dist.data.graph_nodes import GraphNodesDomain

        GraphNodesDomain(domain, {}).check_splits(("train", "val", config.eval.split))
    if not isinstance(domain, ImagesConfig):
        return ""
    from cml_dist.data.set_shape import settled_shape
    from cml_dist.data.shards import ShardSet

    known = known_sets().get(domain.name)
    if not Path(root).exists():
        fetch = f" --download {domain.name}" * bool(known and None not in known.files.values())
        raise DataError(f"{root} is not there", f"cml-dist data pack SOURCE {root}{fetch}")
    shards, domain = ShardSet.open(root), settled_shape(config).domain
    for split in ("train", "val", config.eval.split):
        classes, each = len(shards.split_info(split).classes), domain.queries + domain.unlabelled
        whole, needed = classes - len(shards.short_classes(split, domain.shots, each)), domain.ways + domain.distractors
        if whole < max(needed, classes):
            enough = f"{domain.shots + each} images or more"
            what = f"{root} is a part: {whole} of its {classes} {split} classes have {enough}, and an episode takes"
            raise DataError(f"{what} {needed} classes, any of them", "pack the whole set")
    if known and len(shards) < known.images:
        return f"{root} has {len(shards):,} of the {known.images:,} images: its figures are not those of the whole set"
    return ""


# --------------------------------------------------------------------------- what was found


@dataclass(frozen=True)
class Line:
    """One learner of a row.

    Attributes:
        name: of the row, and ``DAGGER`` for the co-learner.
        published: its figure; None: there is none.
        claimed: by how much it is published above its baseline, in the units of the figures.
        found: of the runs that are finished; None: there are none.
        verdict: on its being better than ``baseline``; None: nothing is claimed, or a run is missing.
    """

    name: str
    row: Row
    learner: Learner
    published: Figure | None
    baseline: str | None
    claimed: float | None
    found: Variant | None
    verdict: Verdict | None

    @property
    def difference(self) -> Difference | None:
        return self.found.difference if self.found else None


def row_of(run: Run) -> str:
    """The row of a run of ``sweeps_of``."""
    return run.name.rpartition(",seed=")[0]


@dataclass(frozen=True)
class Collected:
    """A table: lines, and what is to be said below it."""

    title: str
    score: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def collect(
    title: str, rows: Mapping[str, Row], jobs: Iterable[Job], configs: Mapping[str, RunConfig], notes: Sequence[str]
) -> Collected:
    """The rows with what their finished runs found.

    Args:
        jobs, configs: of the rows that can run.

    Raises:
        CheckpointError: a finished run's records are damaged. ConfigError: rows were tested on other episodes.
    """
    finished: dict[str, list[str]] = {}
    for job in jobs:
        if job.state == "finished":
            finished.setdefault(row_of(job.run), []).append(str(job.folder.path))
    lines, scores = [], set()
    for name, row in rows.items():
        tested = {"meta", *["co"] * (name in configs and not dagger_refusal(configs[name]))}
        for learner in sorted(tested | {*row.published}, reverse=True):
            line = _line(name, row, learner, rows, finished if learner in tested else {})
            lines.append(line)
            scores |= {run.score for run in line.found.runs} if line.found else set()
    regression = any(getattr(config.domain, "ways", 0) == 0 for config in configs.values())
    score = scores.pop() if scores else "mse" if regression else "accuracy"
    return Collected(title, score, tuple(lines), tuple(notes))


def _line(
    name: str, row: Row, learner: Learner, rows: Mapping[str, Row], finished: Mapping[str, Sequence[str]]
) -> Line:
    published, base = row.published.get(learner), row.baseline
    theirs = rows[base].published.get("meta") if base in rows else None
    runs = [read_run(folder, learner) for folder in finished.get(name, ())]
    beside = [read_run(folder, "meta") for folder in finished.get(base or "", ())]
    found = compare([*beside, *runs], beside[0].folder if beside else None).variants[-1] if runs else None
    verdict = judge(found.difference, runs[0].score == "mse") if found and beside else None
    claimed = published[0] - theirs[0] if published and theirs else None
    return Line(name + DAGGER * (learner == "co"), row, learner, published, base, claimed, found, verdict)


def tables(found: Collected) -> list[Table]:
    """Scores beside the published ones, and claims with their verdicts."""
    kind, dash = found.score, text.MISSING

    def figure(value: Figure | None) -> str:
        return dash if value is None else f"{value[0]:.2f}" + (f" ± {value[1]:.2f}" if value[1] is not None else "")

    rows, claims, better = [], [], "below" if kind == "mse" else "above"
    for line in found.lines:
        ours, others = line.found, ", ".join(f"{one.score:.2f}" for one in line.row.reruns)
        runs = len(ours.runs) if ours else 0
        spread = shown(kind, ours.over_seeds.se * math.sqrt(runs)) if ours else dash
        mean = interval(kind, ours.over_episodes) if ours else "not run" if not line.row.absent else "cannot run"
        trend = slope(kind, ours) if ours and line.learner == "meta" else dash  # whose validations chose the step
        rows.append([line.name, figure(line.published), others or dash, mean, spread, trend, str(runs)])
        if line.baseline is not None and (d := line.difference) is not None:
            over_seeds = f"± {shown(kind, d.over_seeds.ci95)}" if math.isfinite(d.over_seeds.ci95) else dash
            cells = [interval(kind, d.over_episodes, "+.2f"), over_seeds, str(line.verdict)]
        else:
            cells = [dash, dash, "not run"]
        if line.baseline is not None and not line.row.absent:
            theirs = dash if line.claimed is None else f"{line.claimed:+.2f}"
            claims.append([f"{line.name} {better} {line.baseline}", theirs, *cells])
    columns = ["row", "published", "others", "ours", "s.d.", "slope", "seeds"]
    claimed = ["claim", "published", "ours", "95 %", "verdict"]
    made = [(f"{found.title}: {score_column(kind)}", columns, rows), (f"{found.title}: claims", claimed, claims)]
    return [table for table in made if table[2]]


EXPLAINED = (
    "±: published, as the paper has it (over its runs, of a kind that it does not state); ours, 95 % over the test "
    "episodes. s.d.: of ours over seeds. slope: of the last validations, per 1,000 steps",
    "Claims: paired differences, with ± over episodes and 95 % over seeds. A claim holds where both intervals exclude "
    "0 on its side, does not hold where both do on the other side, and is undecided else",
)
"""Below every table."""


def as_csv(found: Collected) -> str:
    """Numbers as they are: published in per cent (or as MSE), ours as parts of 1 or as MSE; unknown is empty."""
    columns = ["table", "row", "learner", "published", "published_spread", "others", "seeds", found.score]
    columns += ["episodes_ci95", "seeds_sd", "baseline", "published_difference", "difference"]
    columns += ["difference_episodes_ci95", "difference_seeds_ci95", "verdict", "further_seeds"]
    rows = []
    for line in found.lines:
        ours, d, verdict = line.found, line.difference, line.verdict
        seeds = len(ours.runs) if ours else 0
        row = [found.title, line.name, line.learner, *(line.published or (None, None))]
        row += ["; ".join(f"{one.score} ({one.by})" for one in line.row.reruns), seeds]
        row += [ours.over_episodes.mean, ours.over_episodes.ci95] if ours else [None] * 2
        row += [ours.over_seeds.se * math.sqrt(seeds) if ours else None, line.baseline, line.claimed]
        row += [d.over_episodes.mean, d.over_episodes.ci95, d.over_seeds.ci95] if d else [None] * 3
        row += [str(verdict), verdict.more] if verdict else [None] * 2
        rows.append(row)
    return csv_text(columns, rows)


# --------------------------------------------------------------------------- what the rows are


def listed(rows: Mapping[str, Row], jobs: Mapping[str, Sequence[Job]], lacking: Mapping[str, str]) -> Table:
    """The rows with their figures, how many of their runs are finished, and the time that is left.

    Args:
        jobs: of each row that can run, with seconds of a step where they are known.
        lacking: why a row cannot, in words.
    """
    table = []
    for name, row in rows.items():
        figures = [f"{value[0]:.2f}" + " (dagger)" * (who == "co") for who, value in row.published.items()]
        own = jobs.get(name, ())
        left_s = None if any(job.is_due and job.step_s is None for job in own) else sum(job.left_s for job in own)
        left = "" if name in lacking else text.duration(left_s)
        done = "cannot run" if name in lacking else f"{sum(job.state == 'finished' for job in own)} of {len(own)}"
        others = ", ".join(f"{one.score:.2f}" for one in row.reruns)
        table.append([name, row.baseline or "", ", ".join(figures), others, done, left])
    return "", ["row", "baseline", "published", "others", "runs", "time left"], table


def check_apart(rows: Mapping[str, Row], configs: Mapping[str, RunConfig]) -> None:
    """Refuse a row that is trained as its baseline is: it is the same variant, and no claim."""
    for name, base in ((name, row.baseline) for name, row in rows.items()):
        if name in configs and base in configs and not changes(configs[base], configs[name], UNNAMED_KEYS):
            what = f"with these settings row {name} is the same as its baseline {base}"
            raise ConfigError(what, "leave out what sets both alike, or the row: --rows")


def blocked(rows: Mapping[str, Row], configs: Mapping[str, RunConfig]) -> tuple[dict[str, str], list[str]]:
    """Why rows cannot run, in words by row; and what is to be said of the data of those that can."""
    lacking, notes = {name: row.absent for name, row in rows.items() if row.absent}, []
    for name, config in configs.items():
        try:
            notes += filter(None, [check_data(config)])
        except CmlError as error:
            lacking[name] = str(error)
    return lacking, [*dict.fromkeys(notes)]
