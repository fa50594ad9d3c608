"""Inner optimizers with a state, differentiated exactly; the state starts at zero in each episode."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cml_dist.meta.rule import GradFn, InnerRule
from cml_dist.types import Episode, Params

FIRST, SECOND = "moment1.", "moment2."
"""Prefixes of the state's names among the fast parameters."""


@dataclass(frozen=True)
class Momentum(InnerRule):
    """SGD with momentum (PyTorch's form): m <- momentum * m + gradient; step by rate * m."""

    momentum: float = 0.9

    def start(self, meta: Params, episode: Episode) -> tuple[Params, Params]:
        fast, const = super().start(meta, episode)
        return {**fast, **{f"{FIRST}{n}": torch.zeros_like(value) for n, value in fast.items()}}, const

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        rates = self.rates(fast)
        grads = grad({n: fast[n] for n in rates})
        moments = {n: self.momentum * fast[f"{FIRST}{n}"] + grads[n] for n in rates}
        moved = {n: fast[n] - rate * moments[n] for n, rate in rates.items()}
        return {**moved, **{f"{FIRST}{n}": value for n, value in moments.items()}}


@dataclass(frozen=True)
class Adam(InnerRule):
    """Adam with bias correction, but by sqrt(v + eps): sqrt(v) has no derivative at v = 0, where each episode starts.

    Source: Kingma and Ba, 1412.6980, algorithm 1.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def start(self, meta: Params, episode: Episode) -> tuple[Params, Params]:
        fast, const = super().start(meta, episode)
        state = {f"{prefix}{n}": torch.zeros_like(v) for prefix in (FIRST, SECOND) for n, v in fast.items()}
        return {**fast, **state}, const

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        rates, (beta1, beta2) = self.rates(fast), self.betas
        grads = grad({n: fast[n] for n in rates})
        after: Params = {}
        for n, rate in rates.items():
            first = beta1 * fast[f"{FIRST}{n}"] + (1 - beta1) * grads[n]
            second = beta2 * fast[f"{SECOND}{n}"] + (1 - beta2) * grads[n].square()
            unbiased = second / (1 - beta2 ** (k + 1))
            after[n] = fast[n] - rate / (1 - beta1 ** (k + 1)) * first / (unbiased + self.eps).sqrt()
            after[f"{FIRST}{n}"], after[f"{SECOND}{n}"] = first, second
        return after
