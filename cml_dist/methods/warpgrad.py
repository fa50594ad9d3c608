"""WarpGrad: layers between the others that never adapt, and by their derivative precondition the steps of these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from cml_dist.meta.rule import InnerRule, Term

WARPS = "*.warp.*"
"""Names of warp layers' parameters, as a glob. They live in the body: see ``nets/warp.py``."""


def is_warp(name: str) -> bool:
    return fnmatchcase(name, WARPS)


@dataclass(frozen=True)
class WarpGrad(InnerRule):
    """SGD on all but warp layers. These learn from one step at each visited point; the start learns as MAML's does.

    The warp layers' objective is the sum over k of the outer loss (the co-learner's with it) after one step from
    fast_k, with fast_0 .. fast_{K-1} held constant; each counts alike. All that is meta-trained besides has the
    gradient of the outer loss after the last step, through the whole path, which the paper calls Warp-MAML. With that
    for warp layers too, they are a T-Net's (1801.05558).

    Source: Flennerhag et al., 1909.00025.
    """

    def terms(self, meta_step: int, steps: int) -> tuple[Term, ...]:
        (path,) = super().terms(meta_step, steps)
        return replace(path, trains=f"!{WARPS}"), Term((1.0,) * steps, horizon=1, trains=WARPS)
