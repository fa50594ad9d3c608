"""MGAug: the meta-gradients of pruned sub-networks beside that of the whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cml_dist.types import Episode, Params


@dataclass(frozen=True)
class Pruning:
    """Sub-networks of an episode: what of each tensor is kept (1) and pruned (0), in its inner loop and its query.

    Random masks are a function of (seed, split, index, number of the sub-network) alone; catfish's of the parameters
    and the support set as well. The paper publishes neither ratios nor how the terms are weighted, nor whether scores
    compare within a layer or over all: here each sub-network has a ratio of its own, its outer loss (the co-learner's
    with it) counts ``weight`` beside the whole network's, and scores compare within ``scope``. Head and co-learner are
    not pruned: the head's rows are classes, and phi is not adapted.

    Attributes:
        kind: ``width``: random channels of each layer; ``parameters``: each with the ratio as its probability;
            ``catfish``: those of largest \\|gradient of the support loss * parameter\\|, which memorise most.
        ratios: the part that is pruned of each tensor (of its channels), one for each sub-network.
        groups: names of tensors that are pruned alike along their first axis (``width``: weight, bias, norm), or alone.
        seed: of the masks.
        weight: of each sub-network's outer loss.
        scope: of ``catfish``: ratios are of each ``layer``, so that none is cut through, or of the ``network``.

    Source: Wang et al., 2306.08460.
    """

    kind: Literal["width", "parameters", "catfish"] = "width"
    ratios: tuple[float, ...] = (0.2,)
    groups: tuple[tuple[str, ...], ...] = ()
    seed: int = 0
    weight: float = 1.0
    scope: Literal["layer", "network"] = "layer"

    def masks(self, network: Params, slopes: Callable[[], Params], episode: Episode) -> Iterator[Params]:
        found = slopes() if self.kind == "catfish" else {}
        scores = {n: (found[n] * network[n]).abs() for (n, *_) in self.groups if n in found}
        for number, ratio in enumerate(self.ratios):
            key = [self.seed, episode.index, number, *episode.split.encode()]
            if self.kind == "catfish":
                yield dict(self._worst(scores, ratio))
            else:
                yield dict(self._random(network, ratio, np.random.default_rng(key)))

    def _worst(self, scores: Params, ratio: float) -> Iterator[tuple[str, Tensor]]:
        parts = [{n: score} for n, score in scores.items()] if self.scope == "layer" else [scores]
        for part in filter(None, parts):
            each = torch.cat([score.flatten() for score in part.values()])
            kept = torch.ones_like(each).index_fill(0, each.topk(round(ratio * len(each))).indices, 0.0)
            masks = kept.split([score.numel() for score in part.values()])
            yield from ((n, mask.view_as(part[n])) for n, mask in zip(part, masks, strict=True))

    def _random(self, network: Params, ratio: float, rng: np.random.Generator) -> Iterator[tuple[str, Tensor]]:
        for group in self.groups:
            first = network[group[0]]
            if self.kind == "width":
                channels = len(first)
                pruned = min(max(1, round(ratio * channels)), channels - 1)  # never a whole layer
                kept = torch.from_numpy(rng.permutation(channels) >= pruned).to(first)
                yield from ((n, kept.reshape(-1, *[1] * (network[n].ndim - 1))) for n in group if n in network)
            else:
                yield group[0], torch.from_numpy(rng.random(tuple(first.shape)) >= ratio).to(first)
