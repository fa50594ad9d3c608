"""Meta-SGD: a learned step size for every element that adapts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cml_dist.meta.rule import LEARNED_RATES, GradFn, InnerRule
from cml_dist.types import Params


@dataclass(frozen=True)
class MetaSgd(InnerRule):
    """fast - lr * gradient, element by element; lr starts at ``body_lr`` and ``head_lr``, and is meta-learned.

    It may become negative, as in the paper. Of a head that takes any number of classes, the classes share it.

    Source: Li et al., 1707.09835, eq. 3 to 5.
    """

    def init(self, params: Params) -> Params:
        return {f"{LEARNED_RATES}{n}": torch.full_like(params[n], rate) for n, rate in self.rates(params).items()}

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        grads = grad(fast)
        return {n: value - meta[f"{LEARNED_RATES}{n}"] * grads[n] for n, value in fast.items()}
