"""What a domain is: the owner of the data and of the meaning of loss and score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional

from cml_dist.errors import DataError
from cml_dist.types import Batch, Episode

SPLITS = ("train", "val", "test")

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``: called as work goes on."""


def episode_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The one source of randomness of an episode: a generator made from (seed, split, index) and nothing else."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS.index(split), index])))


def unlabelled_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Of an episode's unlabelled examples, apart from :func:`episode_rng`: they change nothing of the others."""
    return episode_rng(seed, split, index).spawn(4)[3]  # nodes use the first three


class ModelInputs(BaseModel, frozen=True):
    """What a network was trained to read: it belongs to the model, and goes with its checkpoints and its export.

    Attributes:
        input_shape: as of a domain.
        output_dim: as of a domain; None: the network takes any number of classes.
        mean, std: of each channel, of pixels in 0..1; None: inputs are not normalised.
        packed_size: height and width to which pictures are fitted before they are scaled to ``input_shape``, by
            ``interpolation``; None: they are not scaled.
    """

    input_shape: tuple[int, ...]
    output_dim: int | None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    packed_size: tuple[int, int] | None = None
    interpolation: str | None = None


class Domain(ABC):
    """Makes episodes, and says what loss and score mean for them.

    Attributes:
        input_shape: shape of one prepared input without the batch axis, e.g. ``(3, 84, 84)`` or ``(1,)``.
        output_dim: number of outputs of the head (ways, or regression targets).
        score_name: the key of the score in reports: ``"accuracy"`` (a fraction, 0 to 1) or ``"mse"``.
        higher_is_better: whether a larger score is a better one.
        chance: the expected score of guessing, where it is known.
        remarks: what people should know of the data, a line each.
        num_splits: in how many ways its classes can be divided; ``domain.split`` chooses by number, or all.
    """

    input_shape: tuple[int, ...]
    output_dim: int
    score_name: str = "accuracy"
    higher_is_better: bool = True
    chance: float | None = None
    remarks: tuple[str, ...] = ()
    num_splits: int = 1

    @abstractmethod
    def episode(self, split: str, index: int) -> Episode:
        """The episode ``index`` of ``split`` on the CPU in compact form: a pure function of (seed, split, index).

        Beside a GPU it is called in a thread, for two splits at once: what reads a file must not share its position.
        """

    @abstractmethod
    def prepare(self, episode: Episode, device: torch.device, dtype: torch.dtype) -> Episode:
        """The episode on ``device``, normalised, inputs in ``dtype``: ready for the network."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the examples: a scalar that can be differentiated twice."""

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean score over the examples: a scalar without gradient."""

    def grid(self, split: str, index: int) -> Batch | None:
        """An episode's curve without noise on inputs that rise and that all episodes share; None: it is no curve.

        For regression on one number: tests report the score on it too, and ``cml-dist eval --plot`` draws it.
        """
        return None

    def prepared_grid(self, split: str, index: int, device: torch.device, dtype: torch.dtype) -> Batch | None:
        """:meth:`grid` as the network reads it."""
        curve = self.grid(split, index)
        return None if curve is None else self.prepare(Episode(curve, curve, split, index), device, dtype).query

    def load(self, split: str, progress: Progress | None = None) -> bool:
        """Bring a split into memory ahead of its use, where that pays; returns whether it is there."""
        return False

    def suggested_workers(self, split: str) -> int:
        """Processes that pay to prepare episodes of a split ahead; 0 where an episode costs next to nothing."""
        return 0

    def fingerprint(self) -> str:
        """A checksum of the data that episodes are made of; empty where nothing but the configuration makes them."""
        return ""

    def class_names(self, split: str) -> Sequence[str]:
        """Of the classes of a split; empty where they have no names, or the split is not there."""
        return ()

    def describe(self) -> dict[str, Any]:
        """What was decided about the data, as JSON: sizes, statistics, what is kept in memory."""
        return {}

    def largest_episode(self, dtype: torch.dtype) -> Episode | None:
        """Shapes of the largest prepared episode on the meta device; None: all have those of ``input_shape``."""
        return None

    def check_splits(self, splits: Collection[str]) -> None:
        """Raise DataError or ConfigError where these splits cannot fill an episode."""
        return None

    def adopt(self, trained: ModelInputs) -> str | None:
        """Prepare inputs as a model reads them that was trained on other data; returns what is to be said of it.

        Raises:
            DataError: shape or number of classes are not those of the model.
        """
        if tuple(self.input_shape) != trained.input_shape:
            shapes = f"{tuple(self.input_shape)}, but the network reads {trained.input_shape}"
            raise DataError(f"the inputs have shape {shapes}", "use data of the shape that it was trained on")
        if trained.output_dim not in (None, self.output_dim):
            raise DataError(
                f"the data ask for {self.output_dim} outputs (domain.ways), but the network has {trained.output_dim}",
                f"set domain.ways={trained.output_dim}",
            )
        return None

    def model_inputs(self) -> ModelInputs:
        """What a network that is trained on this domain will have to be given, and answers."""
        return ModelInputs(input_shape=tuple(map(int, self.input_shape)), output_dim=int(self.output_dim))

    def preprocessing(self) -> dict[str, Any]:
        """What ``prepare`` does to inputs, as JSON: an exported model repeats it (e.g. mean and std of pixels)."""
        shapes = {"input_shape", "output_dim"}
        return self.model_inputs().model_dump(mode="json", exclude=shapes, exclude_none=True)


class ClassificationDomain(Domain):
    """A domain of classes, judged by cross-entropy and accuracy."""

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    @staticmethod
    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.detach().argmax(dim=-1) == targets).to(outputs.dtype).mean()
