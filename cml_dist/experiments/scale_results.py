"""What the cells of a scaling study come to: results, speed-ups, the fit and its projection. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from cml_dist.experiments.scale import Cell
from cml_dist.experiments.scale_fit import Line, Point, fit, middle

PARTS = ("compute", "waiting", "reduction", "data", "rest")
"""Of a meta-step, see :mod:`cml_dist.experiments.scale_cell`."""

COPIED = (
    "planned_memory", "planned_sent", "reduced_bytes", "reductions", "inputs", "strategy", "by", "hardware", "time"
)  # fmt: skip
"""Of a cell's file."""

Result = dict[str, Any]
"""A measured cell as ``scale.json`` has it, see :func:`result_of`."""


def result_of(cell: Cell, found: Mapping[str, Any]) -> Result:
    """A cell's result from what :meth:`Cell.measured` gives. Seconds are medians over meta-steps, and standard errors.

    - ``episodes``: of a meta-step; ``each``: of it on the busiest rank;
    - ``seconds``: of a meta-step, its ranks' mean; ``parts``: the same, by part; ``local``: but for the reduction;
    - ``small``: of a sum of one number over the ranks; of one process 0;
    - ``memory``, ``planned_memory``: bytes of the rank that takes most, as measured, and as ``cml-dist plan`` says;
    - ``sent``, ``planned_sent``: bytes that a rank sends in a meta-step, by its TCP connections, and by the plan;
    - ``inputs``: the shape of one.
    """
    ranks = found["ranks"]
    each = {part: np.array([[step[part] for step in rank["steps"]] for rank in ranks]) for part in ranks[0]["steps"][0]}
    own = each["reduction"].min(axis=0)  # of who came last
    steps = {part: values.mean(axis=0) for part, values in each.items()}
    steps["waiting"], steps["reduction"] = steps["reduction"] - own, own
    whole = sum(steps.values())
    return {
        "variant": cell.variant,
        "settings": cell.settings,
        "kinds": cell.kinds,
        "world": cell.world,
        "episodes": cell.config.train.episodes_per_step,
        "each": max(found["episodes_by_rank"]),
        "seconds": middle(whole),
        "parts": {part: middle(steps[part]) for part in PARTS},
        "local": middle(whole - own),
        "small": middle(np.min([rank["small"] for rank in ranks], axis=0)) if cell.world > 1 else (0.0, 0.0),
        "memory": max(rank["rise"] for rank in ranks) + found["resident"],
        "sent": max(rank["sent"] for rank in ranks) / len(whole),
        "parameters": sum(found["parameters"].values()),
        "hosts": len({rank["host"] for rank in ranks}),
        **{key: found[key] for key in COPIED},
    }


def points(results: Sequence[Result]) -> list[Point]:
    """What is fitted. One process reduces nothing: what its gradient takes there is taken off the others' reduction."""
    alone = {r["variant"]: r["parts"]["reduction"] for r in results if r["world"] == 1}
    found = []
    for r in results:
        local, (reduced_s, error) = r["local"], r["parts"]["reduction"]
        own_s, its = (reduced_s, error) if r["world"] == 1 else alone.get(r["variant"], (0.0, 0.0))
        local = local[0] + own_s, math.hypot(local[1], its)
        reduction = max(0.0, reduced_s - own_s), math.hypot(error, its)
        size = r["reduced_bytes"], r["reductions"]
        found.append(Point(r["variant"], r["world"], r["each"], local, reduction, *size))
    return found


def _over(first: Result, kind: str, world: int, episodes: int, seconds: tuple[float, float]) -> dict[str, Any]:
    """A point of a scaling curve, measured or projected, with standard errors.

    ``speedup``: episodes a second, over those of the smallest measured world; ``efficiency``: the same a process.
    """
    (base_s, base_error), (now_s, error) = first["seconds"], seconds
    speedup, by = episodes / now_s / (first["episodes"] / base_s), world / first["world"]
    relative = 0.0 if world == first["world"] else math.hypot(base_error / base_s, error / now_s)
    ends = {"speedup": (speedup, speedup * relative), "efficiency": (speedup / by, speedup / by * relative)}
    known = {"variant": first["variant"], "kind": kind, "world": world, "episodes": episodes}
    return {**known, "seconds": seconds, **ends}


def content(
    results: Sequence[Result], worlds: Sequence[int], gbit_per_s: float | None, left_out: Mapping[str, str]
) -> dict[str, Any]:
    """What ``scale.json`` holds beside the study's record: all that tables and figures show.

    ``worlds`` are projected for curves of two measured worlds or more. In strong scaling none has more processes than a
    meta-step has episodes.
    """
    found: dict[str, Any] = {"cells": list(results), "scaling": [], "projected": []}
    found |= {"link_gbit_per_s": gbit_per_s, "left_out": dict(left_out)}
    if not results:
        return found
    bytes_per_s = None if gbit_per_s is None else gbit_per_s * 1e9 / 8
    model = fit(points(results), [(r["world"], r["small"]) for r in results if r["world"] > 1])
    for kind, variant in product(("strong", "weak"), dict.fromkeys(r["variant"] for r in results)):
        own = [r for r in results if kind in r["kinds"] and r["variant"] == variant]
        curve = sorted(own, key=lambda r: r["world"])
        found["scaling"] += [_over(curve[0], kind, r["world"], r["episodes"], r["seconds"]) for r in curve]
        for world in worlds if len(curve) > 1 else ():
            first = curve[0]
            batch = first["episodes"] if kind == "strong" else first["episodes"] // first["world"] * world
            seconds = model.predict(points([first])[0], world, math.ceil(batch / world), bytes_per_s)
            if batch >= world and seconds is not None:
                found["projected"].append(_over(first, kind, world, batch, seconds))

    def told(line: Line) -> dict[str, tuple[float, float]]:
        return {name: line.of(name) for name in line.names}

    local = {variant: told(line) for variant, line in model.local.items()}
    found["fit"] = {"local_s": local, "reduction_s": model.reduction and told(model.reduction)}
    return found
