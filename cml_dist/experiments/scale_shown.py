"""A scaling study as people look at it, from what its ``scale.json`` holds: tables, notes, a section of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cml_dist.experiments.report_figures import Drawn
from cml_dist.experiments.scale import read_study
from cml_dist.experiments.scale_figures import draw_study, variant_numbers
from cml_dist.experiments.scale_results import PARTS
from cml_dist.telemetry.text import amount, number

Table = tuple[str, tuple[str, ...], list[tuple[object, ...]], tuple[str, ...]]
"""Title, columns, rows, and the columns that a narrow screen can do without, the least worth first."""


def with_error(value: Sequence[float]) -> str:
    """A value with its standard error, e.g. ``1.23 ± 0.04``."""
    middle, error = value
    decimals = max(0, 2 - math.floor(math.log10(abs(middle)))) if middle else 3
    return f"{middle:,.{decimals}f} ± {error:,.{decimals}f}"


def tables(study: Mapping[str, Any]) -> Iterator[Table]:
    """All tables of a study; what is projected stands in a table of its own."""
    cells = study["cells"]
    rows = [
        (c["variant"], c["world"], c["episodes"], with_error(c["seconds"]),
         *(number(c["parts"][part][0], 2) for part in PARTS), number(c["episodes"] / c["seconds"][0], 3))
        for c in cells
    ]  # fmt: skip
    columns = ("variant", "N", "episodes", "seconds", *PARTS, "episodes/s")
    yield "Seconds of a meta-step on N processes", columns, rows, ("data", "rest", "waiting", "episodes/s", "reduction")
    if len({c["world"] for c in cells}) > 1:
        yield _scaling("Measured", study["scaling"])
    if study["projected"]:
        link = study["link_gbit_per_s"]
        by = f"over links of {link:g} Gbit/s" if link else "over links as measured"
        yield _scaling(f"Projected, not measured: {by}", study["projected"])
    mib = 2**20
    rows = [
        (c["variant"], c["world"], c["episodes"], amount(c["memory"] / mib), amount(c["planned_memory"] / mib),
         number(c["memory"] / c["planned_memory"], 3), amount(c["sent"] / mib), amount(c["planned_sent"] / mib))
        for c in cells
    ]  # fmt: skip
    columns = ("variant", "N", "episodes", "memory", "planned", "ratio", "sent", "sent, planned")
    yield "MiB of the busiest process: memory, and sent in a meta-step", columns, rows, ("episodes", "sent, planned")


def _scaling(title: str, points: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (p["variant"], p["kind"], p["world"], p["episodes"], with_error(p["seconds"]), with_error(p["speedup"]),
         f"{100 * p['efficiency'][0]:.1f} ± {100 * p['efficiency'][1]:.1f} %")
        for p in points
    ]  # fmt: skip
    columns = ("variant", "scaling", "N", "episodes", "seconds", "speed-up", "efficiency")
    return f"{title}: ± a standard error", columns, rows, ("episodes", "speed-up")


def notes(study: Mapping[str, Any]) -> Iterator[str]:
    """The fit in words, and what limits it."""
    if "fit" not in study:
        return
    if late := {p["variant"]: p for p in study["scaling"] if p["kind"] == "strong"} if study["projected"] else {}:
        most = max(p["episodes"] for p in late.values())
        yield f"Strong scaling ends at as many processes as a meta-step has episodes: {most} here"
    for variant, line in study["fit"]["local_s"].items():
        fixed = f" + {with_error(line['fixed'])} s" if line["fixed"][0] else ""
        yield f"Fit, {variant}: {with_error(line['an episode'])} s an episode of a process{fixed}"
    if (links := study["fit"]["reduction_s"]) is None:
        return
    said = []
    if links["latency"][0]:
        said.append(f"{with_error([1e6 * value for value in links['latency']])} microseconds a round")
    if (each := links["a byte"])[0]:
        gbit = 8e-9 / each[0]
        said.append(f"{with_error((gbit, gbit * each[1] / each[0]))} Gbit/s")
    missing = "" if len(said) == 2 else "; latency and bandwidth could not be told apart: one stands for both"
    yield f"Fit, reduction: {', '.join(said)}{missing}"


@dataclass(frozen=True)
class ShownStudy:
    """A study on a page; rows of ``tables`` come with the number of their variant."""

    folder: str
    tables: list[tuple[str, tuple[str, ...], list[tuple[int, tuple[object, ...]]]]]
    notes: list[str]
    figures: list[Drawn]


def shown_study(folder: str) -> ShownStudy | None:
    """The study in a folder; None: it is none, or nothing is measured yet.

    Raises:
        CheckpointError: it is damaged.
    """
    study = read_study(folder)
    if study is None or not study["cells"]:
        return None
    numbers = variant_numbers(study["cells"])
    numbered = [(title, columns, [(numbers[row[0]], row) for row in rows]) for title, columns, rows, _ in tables(study)]
    return ShownStudy(folder, numbered, [*notes(study)], [*draw_study(study)])
