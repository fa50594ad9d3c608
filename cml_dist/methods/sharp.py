"""Sharp-MAML's lower level: each inner step takes its gradient where the support loss has risen."""

from __future__ import annotations

from dataclasses import dataclass

from cml_dist.meta.rule import GradFn, InnerRule
from cml_dist.types import Params


@dataclass(frozen=True)
class SharpSgd(InnerRule):
    """fast - lr * gradient at (fast + radius g / |g|), with g the gradient at fast, and one norm over all that adapts.

    Attributes:
        radius: length of the ascent.
        exact: differentiate through the ascent as well; else it is a constant, for a Hessian-vector product less.

    Source: Abbas et al., 2206.03996, algorithm 1, the lower level.
    """

    radius: float = 0.05
    exact: bool = True

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        ascent = grad(fast)
        if not self.exact:
            ascent = {n: g.detach() for n, g in ascent.items()}
        # Under the root too: at a gradient of exactly zero it has no derivative.
        norm = sum(g.square().sum() for g in ascent.values()).add(1e-24).sqrt() + 1e-12
        grads = grad({n: value + self.radius * ascent[n] / norm for n, value in fast.items()})
        rates = self.rates(fast)
        return {n: value - rates[n] * grads[n] for n, value in fast.items()}
