"""MAML++: step sizes and norms of their own for each inner step, and losses after all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from cml_dist.meta.rule import LEARNED_RATES, GradFn, InnerRule, Term
from cml_dist.types import Params

ROWS = "rule.norm."
"""Prefix of a norm's learned gains or biases ``[K, C]``, one row a step; the step sizes are ``[K]`` a tensor."""

LEAST = 0.03
"""Least weight of an early step's loss while there is a multi-step loss, as a part of an equal share."""


@dataclass(frozen=True)
class MamlPlusPlus(InnerRule):
    """fast - lr[k] * gradient with a learned lr a tensor a step, norms of a row a step, and a multi-step loss.

    The support set of step k and the query after it see row k. Norms do not adapt in the inner loop. Steps after the
    last row go on with it. Rates start at ``body_lr`` and ``head_lr``, rows at the network's own values.

    Attributes:
        steps: rows K: the inner steps of training.
        norms: gains and biases of the network, by canonical name, that have a row a step.
        multi_step_loss: meta-steps in which the query losses after all inner steps count.
        multi_step_every: meta-steps of what the paper calls an epoch: the weights change once in each.

    Source: Antoniou et al., 1810.09502, section 4.
    """

    steps: int = 5
    norms: tuple[str, ...] = ()
    multi_step_loss: int = 0
    multi_step_every: int = 500

    @property
    def replaces(self) -> tuple[str, ...]:
        return self.norms

    def rates(self, names: Iterable[str]) -> dict[str, float]:
        return super().rates(n for n in names if n not in self.norms)

    def init(self, params: Params) -> Params:
        rates = {n: params[n].new_full((self.steps,), rate) for n, rate in self.rates(params).items()}
        rows = {f"{ROWS}{n}": params[n].repeat(self.steps, 1) for n in self.norms if n in params}
        return {f"{LEARNED_RATES}{n}": rate for n, rate in rates.items()} | rows

    def network(self, meta: Params, k: int) -> Params:
        own = {n.removeprefix(ROWS): _row(rows, k) for n, rows in meta.items() if n.startswith(ROWS)}
        return {**super().network(meta, k), **own}

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        grads = grad(fast)
        return {n: value - _row(meta[f"{LEARNED_RATES}{n}"], k) * grads[n] for n, value in fast.items()}

    def terms(self, meta_step: int, steps: int) -> tuple[Term, ...]:
        if steps < 2 or meta_step >= self.multi_step_loss:
            return super().terms(meta_step, steps)
        begun = meta_step - meta_step % self.multi_step_every  # the first meta-step of this epoch
        early = max(1 - begun / self.multi_step_loss, LEAST) / steps
        return (Term((early,) * (steps - 1) + (1 - early * (steps - 1),)),)


def _row(rows: Tensor, k: int) -> Tensor:
    return rows[min(k, len(rows) - 1)]
