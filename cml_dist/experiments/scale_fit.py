"""A model of a meta-step's seconds, fitted to what was measured by weighted least squares; pure NumPy.

On the busiest of N ranks with E episodes, for each variant of the study its own a and b::

    local(E)     = b + a E                                     data, compute, waiting, and the rest
    reduction(N) = rounds x latency + sent / bandwidth         a ring: rounds = 2 (N - 1), sent = 2 (N - 1) / N x bytes

Latency and bandwidth are the study's: all variants share the links. The meta-gradient is a value when its reduction
begins, so that none of it runs beside the computing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_ERROR = 1e-3
"""No measurement is taken to be better than a thousandth: a short one cannot know it."""


MOST_ALIKE = 1e6
"""The condition number from which on two coefficients cannot be told apart."""


@dataclass(frozen=True)
class Point:
    """A measured cell: seconds with their standard errors.

    Attributes:
        episodes: of a meta-step, on the busiest rank.
        bytes, reductions: that all reductions of a meta-step sum up, and how many they are.
    """

    variant: str
    world: int
    episodes: int
    local: tuple[float, float]
    reduction: tuple[float, float]
    bytes: int
    reductions: int = 1


@dataclass(frozen=True)
class Line:
    """Coefficients by name, which are 0 or more, with their covariance."""

    names: tuple[str, ...]
    values: np.ndarray
    covariance: np.ndarray

    def at(self, row: Sequence[float]) -> tuple[float, float]:
        """The value at ``row``, and its standard error."""
        row = np.asarray(row, dtype=float)
        return float(row @ self.values), math.sqrt(max(0.0, float(row @ self.covariance @ row)))

    def of(self, name: str) -> tuple[float, float]:
        """A coefficient, and its standard error."""
        return self.at([float(one == name) for one in self.names])


@dataclass(frozen=True)
class Fit:
    """``local``: by variant, of ``fixed`` and ``an episode``; ``reduction``: of ``latency`` and ``a byte``, or None."""

    local: dict[str, Line]
    reduction: Line | None

    def predict(
        self, point: Point, world: int, episodes: int, bytes_per_s: float | None = None
    ) -> tuple[float, float] | None:
        """Seconds of a meta-step and their standard error; None where it cannot be known.

        Args:
            point: any of the variant's.
            bytes_per_s: of the links, instead of what was measured.
        """
        seconds, error = self.local[point.variant].at([1, episodes])
        if world == 1:
            return seconds, error
        if self.reduction is None:
            return None
        rounds, sent = ring(point, world)
        more, its = self.reduction.at([rounds, 0 if bytes_per_s else sent])
        more += sent / bytes_per_s if bytes_per_s else 0
        return seconds + more, math.hypot(error, its)


def ring(point: Point, world: int) -> tuple[int, float]:
    """Rounds of the rings in which ``world`` ranks reduce, one after the other, and bytes that each rank sends."""
    return 2 * (world - 1) * point.reductions, 2 * (world - 1) / world * point.bytes


def fit(points: Sequence[Point], small: Sequence[tuple[int, tuple[float, float]]] = ()) -> Fit:
    """The model of these cells, and of sums of one number: worlds, and their seconds with standard errors.

    What a coefficient's data cannot tell is left out: ``fixed`` where all cells of a variant have as many episodes a
    rank, ``latency`` where only one size was reduced in one world. Nor is any below 0.
    """
    by_variant: dict[str, list[Point]] = {}
    for point in points:
        by_variant.setdefault(point.variant, []).append(point)
    local = {
        variant: _line(("fixed", "an episode"), [(1, p.episodes) for p in own], [p.local for p in own])
        for variant, own in by_variant.items()
    }
    reduced = [p for p in points if p.world > 1]
    rows = [*(ring(p, p.world) for p in reduced), *((2 * (world - 1), 0.0) for world, _ in small)]
    measured = [*(p.reduction for p in reduced), *(seconds for _, seconds in small)]
    return Fit(local, _line(("latency", "a byte"), rows, measured) if reduced else None)


def _line(names: tuple[str, str], rows: Sequence[Sequence[float]], measured: Sequence[tuple[float, float]]) -> Line:
    """Two coefficients of which the second may have to carry all; errors grow where the points scatter by more."""
    y = np.array([value for value, _ in measured])
    errors = np.maximum([error for _, error in measured], LEAST_ERROR * np.abs(y)) + 1e-12

    def solved(kept: list[int]) -> tuple[float, np.ndarray, np.ndarray]:
        """Sum of squared residuals, values and covariance, if these coefficients alone explain it."""
        a = np.array(rows, dtype=float)[:, kept]
        scale = np.abs(a).max(axis=0)
        a = a / scale / errors[:, None]
        if np.linalg.matrix_rank(a, rtol=1 / MOST_ALIKE) < len(kept):
            return math.inf, np.zeros(2), np.zeros((2, 2))
        found = np.linalg.lstsq(a, y / errors, rcond=None)[0]
        squares, free = float(np.sum((a @ found - y / errors) ** 2)), len(y) - len(kept)
        values, covariance = np.zeros(2), np.zeros((2, 2))
        values[kept] = found / scale
        covariance[np.ix_(kept, kept)] = np.linalg.inv(a.T @ a) / np.outer(scale, scale)
        return squares, values, covariance * max(1.0, squares / free if free else 0.0)

    squares, values, covariance = solved([0, 1])
    if math.isinf(squares) or (values < 0).any():
        # Of two that explain it as well the second. That both could have been there remains in the errors.
        _, values, alone = min(solved([1]), solved([0]), key=lambda one: round(one[0], 6))
        covariance = alone if math.isinf(squares) else covariance
    return Line(names, values, covariance)


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Median of steps, and its standard error by their median absolute deviation, as of a normal distribution."""
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(np.asarray(values) - median)))
    return median, math.sqrt(math.pi / 2) * spread / math.sqrt(len(values))
