"""Intervals: of a mean over few or many episodes or seeds, by Student's t; and of a share of cases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes or seeds.

    Attributes:
        mean: of the values.
        ci95: half width of its 95 % interval; NaN of one value, as the next two.
        se: its standard error.
        p: with which probability values whose true mean is 0 have a mean at least so far from it (two-sided t test).
    """

    mean: float
    ci95: float = math.nan
    se: float = math.nan
    p: float = math.nan


def estimate(values: np.ndarray) -> Estimate:
    """Of ``[n]`` independent values; of paired ones give the differences."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2 or not math.isfinite(mean):
        return Estimate(mean)
    std = float(np.std(values, ddof=1))
    se = std / math.sqrt(count)
    t = abs(mean) / se if se else math.inf if mean else 0.0
    return Estimate(mean, half_width(std, count), se, p_value(t, count - 1))


def half_width(std: float, count: int) -> float:
    """Half width of the 95 % interval of the mean of ``count`` values, two or more, of this standard deviation."""
    return t_quantile(count - 1) * std / math.sqrt(count)


@cache
def t_quantile(freedom: int) -> float:
    """The t within which a variable of Student's distribution lies, to either side, with probability 95 %.

    The angle of :func:`_within` is found by bisection, to the last digit.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def p_value(t: float, freedom: int) -> float:
    """The probability with which a variable of Student's distribution lies beyond ``t``, 0 or more, to either side."""
    return max(0.0, 1.0 - _within(math.atan(t / math.sqrt(freedom)), freedom))


def _within(angle: float, freedom: int) -> float:
    """With which probability a variable of Student's distribution lies within sqrt(freedom) tan(angle) to either side.

    *Source*: Abramowitz and Stegun, 26.7.3 and 26.7.4: a finite sum in sin(angle) and cos(angle).
    """
    odd = freedom % 2
    factors, powers = _series(freedom)
    total = math.sin(angle) * float(factors @ math.cos(angle) ** powers) if freedom > 1 else 0.0
    return 2 / math.pi * (angle + total) if odd else total


@cache
def _series(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    odd = freedom % 2
    k = np.arange(1, (freedom - odd) // 2)
    factors = np.cumprod(np.concatenate([[1.0], 2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)]))
    return factors, 2 * np.arange(len(factors)) + odd


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent cases, Wilson's: it has a width also at none and at all.

    *Source*: Wilson, Journal of the American Statistical Association 22 (1927).
    """
    z = NormalDist().inv_cdf(0.975)
    middle = (hits + z * z / 2) / (count + z * z)
    width = z / (count + z * z) * math.sqrt(hits * (count - hits) / count + z * z / 4)
    low, high = middle - width, middle + width
    return low if hits > 0 else 0.0, high if hits < count else 1.0
