"""Intervals: of a mean over few or many episodes, by Student's t; and of a share of cases."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np


def half_width(std: float, count: int) -> float:
    """Half width of the 95 % interval of the mean of ``count`` values, two or more, of this standard deviation."""
    return t_quantile(count - 1) * std / math.sqrt(count)


@cache
def t_quantile(freedom: int) -> float:
    """The t within which a variable of Student's distribution lies, to either side, with probability 95 %.

    *Source*: Abramowitz and Stegun, 26.7.3 and 26.7.4: for t = sqrt(freedom) tan(a) that probability is a finite sum in
    sin(a) and cos(a). The angle is found by bisection, to the last digit.
    """
    odd = freedom % 2
    k = np.arange(1, (freedom - odd) // 2)
    factors = np.cumprod(np.concatenate([[1.0], 2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)]))
    powers = 2 * np.arange(len(factors)) + odd

    def within(a: float) -> float:
        total = math.sin(a) * float(factors @ math.cos(a) ** powers) if freedom > 1 else 0.0
        return 2 / math.pi * (a + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent cases, Wilson's: it has a width also at none and at all.

    *Source*: Wilson, Journal of the American Statistical Association 22 (1927).
    """
    z = NormalDist().inv_cdf(0.975)
    middle = (hits + z * z / 2) / (count + z * z)
    width = z / (count + z * z) * math.sqrt(hits * (count - hits) / count + z * z / 4)
    low, high = middle - width, middle + width
    return low if hits > 0 else 0.0, high if hits < count else 1.0
