"""Regression on one number: a sine wave of unknown amplitude and phase, or a line, from a few of its points."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cml_dist.config.schema import SinusoidConfig
from cml_dist.data.base import SPLITS, Domain, Progress, episode_rng
from cml_dist.errors import ConfigError
from cml_dist.types import Batch, Episode

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
INPUT = (-5.0, 5.0)
SLOPE = INTERCEPT = (-3.0, 3.0)


class SinusoidDomain(Domain):
    """Episodes of y = A sin(x - phase), with A, phase and x uniform in their ranges; judged by mean squared error.

    Of ``family=mixed`` those of odd index are lines instead: half of each meta-step of an even number of episodes.

    *Source*: CML, section 5.1 (as MAML, section 5.1); mixed: Finn et al. (2018, 1806.02817), halves as in the code of
    Vuorio et al. (2019, 1910.13616).
    """

    input_shape = (1,)
    output_dim = 1
    score_name = "mse"
    higher_is_better = False

    def __init__(
        self, config: SinusoidConfig, seeds: Mapping[str, int], processes: int = 1, progress: Progress | None = None
    ) -> None:
        """``seeds`` are by split; there are no data to share or to fetch."""
        self.shots, self.queries, self.noise, self.family = config.shots, config.queries, config.noise, config.family
        self._seeds, self._draw = seeds, config.draw

    def episode(self, split: str, index: int) -> Episode:
        """One curve: inputs and targets ``[N, 1]`` float64, N = shots in the support and queries in the query set.

        Raises:
            ConfigError: if there is no such split.
        """
        rng, curve = self._curve(split, index)
        x = rng.uniform(*INPUT, size=(self.shots + self.queries, 1))
        y = curve(x)
        if self.noise:
            # From a generator of its own, or the support set's would depend on how many points the query set has.
            noise = rng if self._draw == 1 else rng.spawn(1)[0]
            y = y + noise.normal(scale=self.noise, size=y.shape)
        inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
        support, query = (Batch(inputs[part], targets[part]) for part in (slice(self.shots), slice(self.shots, None)))
        return Episode(support=support, query=query, split=split, index=index)

    def grid(self, split: str, index: int) -> Batch:
        x = np.linspace(*INPUT, 101)[:, None]
        return Batch(torch.from_numpy(x), torch.from_numpy(self._curve(split, index)[1](x)))

    def _curve(self, split: str, index: int) -> tuple[np.random.Generator, Callable[[np.ndarray], np.ndarray]]:
        """What an episode is drawn from, and y of x without noise."""
        if split not in self._seeds:
            raise ConfigError(f"split is {split!r}", f"use one of {', '.join(SPLITS)}")
        rng = episode_rng(self._seeds[split], split, index)
        if self.family == "mixed" and index % 2:
            slope, intercept = rng.uniform(*SLOPE), rng.uniform(*INTERCEPT)
            return rng, lambda x: slope * x + intercept
        amplitude, phase = rng.uniform(*AMPLITUDE), rng.uniform(*PHASE)
        return rng, lambda x: amplitude * np.sin(x - phase)

    def prepare(self, episode: Episode, device: torch.device, dtype: torch.dtype) -> Episode:
        return episode.map(lambda tensor: tensor.to(device, dtype, non_blocking=True))  # targets too

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs, targets)

    @staticmethod
    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs.detach(), targets)
