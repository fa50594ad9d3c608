"""Whether a paired difference bears out a claim. A pure function of two intervals."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from cml_dist.experiments.compare import Difference
from cml_dist.run.interval import Estimate, half_width

MOST_SEEDS = 1000
"""More seeds than these are not counted."""


@dataclass(frozen=True)
class Verdict:
    """On the claim that one learner is above another one.

    Attributes:
        word: ``holds``, ``does not hold`` or ``undecided``.
        seeds: those that both have; with one the interval is over episodes alone.
        more: undecided: how many further seeds would decide, if mean and spread stayed; None: not known, or no number.
        reason: what stands behind it, in words; may be empty.
    """

    word: str
    seeds: int
    more: int | None = None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word


def judge(difference: Difference, lower_is_better: bool = False) -> Verdict:
    """The verdict on "better than the baseline", by the 95 % intervals of the paired difference.

    It holds where the interval over seeds and the one over episodes both exclude 0 on the good side, and does not hold
    where both do on the other side. Of one seed there is no interval over seeds, and that over episodes decides.
    """
    seeds = len(difference.seeds)
    asked = [difference.over_episodes, *[difference.over_seeds] * (seeds > 1)]
    alone = "by episodes alone, of one seed" if seeds == 1 else "" if seeds else "no seed in common"
    if seeds and all(map(_excludes_0, asked)):
        below = difference.over_episodes.mean < 0
        return Verdict("holds" if below == lower_is_better else "does not hold", seeds, reason=alone)
    if alone or not math.isfinite(difference.over_seeds.mean):
        return Verdict("undecided", seeds, reason=alone or "scores are not finite")
    if _excludes_0(difference.over_seeds):
        return Verdict("undecided", seeds, reason="more test episodes would decide (eval.episodes)")
    if (more := _further_seeds(difference.over_seeds, seeds)) is None:
        return Verdict("undecided", seeds, reason=f"not even {MOST_SEEDS:,} seeds would decide")
    return Verdict("undecided", seeds, more, f"about {more} more seed{'s' * (more != 1)} would decide")


def _excludes_0(value: Estimate) -> bool:
    return abs(value.mean) > value.ci95  # not where there is no interval: NaN


def _further_seeds(value: Estimate, seeds: int) -> int | None:
    std = value.se * math.sqrt(seeds)
    counts = range(seeds + 1, MOST_SEEDS + 1)
    found = bisect.bisect_left(counts, True, key=lambda count: half_width(std, count) < abs(value.mean))
    return counts[found] - seeds if found < len(counts) else None
