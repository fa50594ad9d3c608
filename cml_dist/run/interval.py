"""The interval of a mean over few or many episodes, by Student's t."""

from __future__ import annotations

import math
from functools import cache

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
