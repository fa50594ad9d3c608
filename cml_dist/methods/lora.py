"""LoRA: low-rank factors beside linear weights adapt in the inner loop, from a meta-learned start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from cml_dist.meta.rule import InnerRule, network_part
from cml_dist.types import BODY, Params

PREFIX = "rule.lora."


@dataclass(frozen=True)
class Lora(InnerRule):
    """The network sees W + B A of each weight W ``[out, in]``; A ``[r, in]`` and B ``[out, r]`` adapt by SGD.

    Of W nothing is copied in an inner step, and it may be frozen. A starts at noise of variance 1 / in and B at 0, so
    that the network starts as it is; both are meta-learned. A pass through the network holds the sums W + B A.

    Attributes:
        rank: the largest r; a smaller weight has its own rank.
        beside: name, out and in of each weight.
        seed: of the noise.

    Source: Hu et al., 2106.09685, eq. 3, with the scale in ``body_lr``.
    """

    rank: int = 1
    beside: tuple[tuple[str, int, int], ...] = ()
    seed: int = 0

    def rates(self, names: Iterable[str]) -> dict[str, float]:
        names = list(names)
        factors = [n for n in names if n.startswith(PREFIX)] if self.body_lr > 0 and BODY in self.parts else []
        return super().rates(names) | dict.fromkeys(factors, self.body_lr)

    def init(self, params: Params) -> Params:
        generator, like, factors = torch.Generator().manual_seed(self.seed), next(iter(params.values())), {}
        for name, outputs, inputs in self.beside:
            rank = min(self.rank, outputs, inputs)
            noise = torch.randn(rank, inputs, generator=generator, device="cpu") / inputs**0.5
            factors |= {f"{PREFIX}{name}.A": noise.to(like), f"{PREFIX}{name}.B": like.new_zeros(outputs, rank)}
        return factors

    def network(self, meta: Params, k: int) -> Params:
        return self._merged(super().network(meta, k), meta)

    def view(self, meta: Params, fast: Params, const: Params, k: int) -> Params:
        return self._merged(network_part({**meta, **const, **fast}), {**meta, **fast})

    def _merged(self, network: Params, factors: Params) -> Params:
        """``network`` with W + B A for each W."""
        sums = {n: network[n] + factors[f"{PREFIX}{n}.B"] @ factors[f"{PREFIX}{n}.A"] for n, *_ in self.beside}
        return {**network, **sums}
