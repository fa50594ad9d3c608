"""What the cells of a scaling study come to: results, speed-ups, the fit and its projection. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cml_dist.experiments.scale import Cell
from cml_dist.experiments.scale_fit import Fit, Point, fit, middle

PARTS = ("compute", "waiting", "reduction", "data", "rest")
"""Of a meta-step, see :mod:`cml_dist.experiments.scale_cell`."""

Measured = tuple[float, float]
"""A median over meta-steps, and its standard error."""


@dataclass(frozen=True)
class Result:
    """A measured cell.

    Attributes:
        episodes: of a meta-step; ``each``: of it on the busiest rank.
        seconds: of a meta-step, its ranks' mean; ``parts``: the same, by part.
        memory, planned_memory: bytes of the rank that takes most, as measured, and as ``cml-dist plan`` says.
        small: seconds of a sum of one number over the ranks; of one process 0.
        sent, planned_sent: bytes that a rank sends in a meta-step, by its TCP connections, and by the plan.
        inputs: the shape of one.
    """

    variant: str
    settings: dict[str, Any]
    kinds: tuple[str, ...]
    world: int
    episodes: int
    each: int
    seconds: Measured
    parts: dict[str, Measured]
    local: Measured
    small: Measured
    memory: int
    planned_memory: int
    sent: float
    planned_sent: int
    reduced_bytes: int
    reductions: int
    parameters: int
    inputs: tuple[int, ...]
    strategy: str
    by: str
    hardware: str
    hosts: int
    time: str


def result_of(cell: Cell, found: Mapping[str, Any]) -> Result:
    """A cell's result from what :meth:`Cell.measured` gives."""
    ranks = found["ranks"]
    each = {part: np.array([[step[part] for step in rank["steps"]] for rank in ranks]) for part in ranks[0]["steps"][0]}
    own = each["reduction"].min(axis=0)  # of who came last
    steps = {part: values.mean(axis=0) for part, values in each.items()}
    steps["waiting"], steps["reduction"] = steps["reduction"] - own, own
    whole = sum(steps.values())
    return Result(
        variant=cell.variant,
        settings=cell.settings,
        kinds=cell.kinds,
        world=cell.world,
        episodes=cell.config.train.episodes_per_step,
        each=max(found["episodes_by_rank"]),
        seconds=middle(whole),
        parts={part: middle(steps[part]) for part in PARTS},
        local=middle(whole - own),
        small=middle(np.min([rank["small"] for rank in ranks], axis=0)) if cell.world > 1 else (0.0, 0.0),
        memory=max(rank["rise"] for rank in ranks) + found["resident"],
        planned_memory=found["planned_memory"],
        sent=max(rank["sent"] for rank in ranks) / len(whole),
        planned_sent=found["planned_sent"],
        reduced_bytes=found["reduced_bytes"],
        reductions=found["reductions"],
        parameters=sum(found["parameters"].values()),
        inputs=tuple(found["inputs"]),
        strategy=found["strategy"],
        by=found["by"],
        hardware=found["hardware"],
        hosts=len({rank["host"] for rank in ranks}),
        time=found["time"],
    )


@dataclass(frozen=True)
class Scaled:
    """A point of a scaling curve, measured or projected, with standard errors.

    Attributes:
        speedup: episodes a second, over those of the curve's smallest measured world.
        efficiency: the same a process.
    """

    variant: str
    kind: str
    world: int
    episodes: int
    seconds: Measured
    speedup: Measured
    efficiency: Measured


def scaled(results: Sequence[Result], kind: str) -> list[Scaled]:
    """The measured points of all curves of a kind."""
    found = []
    for curve in _curves(results, kind):
        for result in curve:
            found.append(_over(curve[0], kind, result.world, result.episodes, result.seconds))
    return found


def projected(
    results: Sequence[Result], model: Fit, kind: str, worlds: Sequence[int], bytes_per_s: float | None
) -> list[Scaled]:
    """Points of the curves that have two worlds or more, in worlds that were not measured.

    In strong scaling no world has more processes than a meta-step has episodes.
    """
    found = []
    for curve in _curves(results, kind):
        first = curve[0]
        (point,) = points([first])
        for world in worlds if len(curve) > 1 else ():
            batch = first.episodes if kind == "strong" else first.episodes // first.world * world
            seconds = model.predict(point, world, math.ceil(batch / world), bytes_per_s)
            if batch >= world and seconds is not None:
                found.append(_over(first, kind, world, batch, seconds))
    return found


def points(results: Sequence[Result]) -> list[Point]:
    """What is fitted. One process reduces nothing: what its gradient takes there is taken off the others' reduction."""
    alone = {result.variant: result.parts["reduction"] for result in results if result.world == 1}
    found = []
    for r in results:
        local, (reduced_s, error) = r.local, r.parts["reduction"]
        own_s, its = (reduced_s, error) if r.world == 1 else alone.get(r.variant, (0.0, 0.0))
        local = local[0] + own_s, math.hypot(local[1], its)
        reduction = max(0.0, reduced_s - own_s), math.hypot(error, its)
        found.append(Point(r.variant, r.world, r.each, local, reduction, r.reduced_bytes, r.reductions))
    return found


def _curves(results: Sequence[Result], kind: str) -> list[list[Result]]:
    """By variant, from the smallest world."""
    by: dict[str, list[Result]] = {}
    for result in results:
        if kind in result.kinds:
            by.setdefault(result.variant, []).append(result)
    return [sorted(curve, key=lambda one: one.world) for curve in by.values()]


def _over(first: Result, kind: str, world: int, episodes: int, seconds: Measured) -> Scaled:
    (base_s, base_error), (now_s, error) = first.seconds, seconds
    speedup = episodes / now_s / (first.episodes / base_s)
    relative = 0.0 if world == first.world else math.hypot(base_error / base_s, error / now_s)
    by = world / first.world
    ends = (speedup, speedup * relative), (speedup / by, speedup / by * relative)
    return Scaled(first.variant, kind, world, episodes, seconds, *ends)


def content(
    results: Sequence[Result], worlds: Sequence[int], gbit_per_s: float | None, left_out: Mapping[str, str]
) -> dict[str, Any]:
    """What ``scale.json`` holds beside the study's record: all that tables and figures show."""
    bytes_per_s = None if gbit_per_s is None else gbit_per_s * 1e9 / 8
    model = fit(points(results), [(r.world, r.small) for r in results if r.world > 1]) if results else None
    kinds = [kind for kind in ("strong", "weak") if any(kind in result.kinds for result in results)]
    ahead = [one for kind in kinds for one in projected(results, model, kind, worlds, bytes_per_s)]
    found: dict[str, Any] = {
        "cells": [asdict(result) for result in results],
        "scaling": [asdict(one) for kind in kinds for one in scaled(results, kind)],
        "projected": [asdict(one) for one in ahead],
        "link_gbit_per_s": gbit_per_s,
        "left_out": dict(left_out),
    }
    if model is not None:
        local = {variant: {name: line.of(name) for name in line.names} for variant, line in model.local.items()}
        links = None if model.reduction is None else {name: model.reduction.of(name) for name in model.reduction.names}
        found["fit"] = {"local_s": local, "reduction_s": links}
    return found
