"""What a domain is: the owner of the data and of the meaning of loss and score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cml_dist.types import Episode

SPLITS = ("train", "val", "test")

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``: called as work goes on."""


def episode_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The one source of randomness of an episode: a generator made from (seed, split, index) and nothing else."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS.index(split), index])))


class Domain(ABC):
    """Makes episodes, and says what loss and score mean for them.

    Attributes:
        input_shape: shape of one prepared input without the batch axis, e.g. ``(3, 84, 84)`` or ``(1,)``.
        output_dim: number of outputs of the head (ways, or regression targets).
        score_name: the key of the score in reports: ``"accuracy"`` (a fraction, 0 to 1) or ``"mse"``.
        higher_is_better: whether a larger score is a better one.
        chance: the expected score of guessing, where it is known.
    """

    input_shape: tuple[int, ...]
    output_dim: int
    score_name: str = "accuracy"
    higher_is_better: bool = True
    chance: float | None = None

    @abstractmethod
    def episode(self, split: str, index: int) -> Episode:
        """The episode ``index`` of ``split`` on the CPU in compact form: a pure function of (seed, split, index)."""

    @abstractmethod
    def prepare(self, episode: Episode, device: torch.device, dtype: torch.dtype) -> Episode:
        """The episode on ``device``, normalised, inputs in ``dtype``: ready for the network."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the examples: a scalar that can be differentiated twice."""

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean score over the examples: a scalar without gradient."""

    def load(self, split: str, progress: Progress | None = None) -> bool:
        """Bring a split into memory ahead of its use, where that pays; returns whether it is there."""
        return False

    def suggested_workers(self, split: str) -> int:
        """Processes that pay to prepare episodes of a split ahead; 0 where an episode costs next to nothing."""
        return 0

    def fingerprint(self) -> str:
        """A checksum of the data that episodes are made of; empty where nothing but the configuration makes them."""
        return ""

    def describe(self) -> dict[str, Any]:
        """What was decided about the data, as JSON: sizes, statistics, what is kept in memory."""
        return {}

    def preprocessing(self) -> dict[str, Any]:
        """What ``prepare`` does to inputs, as JSON: an exported model repeats it (e.g. mean and std of pixels)."""
        return {}
