"""Few-shot episodes of images from a shard set: classification with cross-entropy and accuracy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import get_worker_info

from cml_dist.config.schema import ImageSettings
from cml_dist.domains import augment
from cml_dist.domains.base import SPLITS, Domain, episode_rng
from cml_dist.domains.decoded import decode_split
from cml_dist.domains.free_memory import available_bytes
from cml_dist.domains.image_checks import check_splits, normalisation, num_classes
from cml_dist.domains.sampling import draw, split_turns, turned_classes
from cml_dist.domains.shard_format import Progress
from cml_dist.domains.shard_reader import ShardSet
from cml_dist.errors import ConfigError, DataError
from cml_dist.types import Batch, Episode

_GIB = 2**30


class ImageDomain(Domain):
    """N-way K-shot episodes over the classes of a packed image set.

    Labels are ``0..ways-1`` in the order in which the classes were drawn; support and query are ordered class by class.
    A split is decoded once and kept as uint8 where it fits ``settings.memory_gib`` and this process's part of half the
    memory that is free now; else each episode decodes its own images. Either way an episode is the same. The object can
    be pickled and forked; decoded splits are inherited by a fork, and not pickled.

    Args:
        shards: the packed set.
        settings: ways, shots, queries, normalisation, augmentation, memory.
        train_seed: chooses the episodes of ``train``.
        eval_seed: chooses the episodes of ``val`` and ``test``.
        splits: the splits that will be used; each is checked.
        processes: how many on this machine keep the same data.

    Raises:
        DataError: if a split has too few classes or a class too few images (named).
        ConfigError: if mean and std do not fit the images.
    """

    score_name = "accuracy"
    higher_is_better = True

    def __init__(
        self,
        shards: ShardSet,
        settings: ImageSettings,
        *,
        train_seed: int,
        eval_seed: int,
        splits: Sequence[str] = SPLITS,
        processes: int = 1,
    ) -> None:
        self.shards = shards
        self.settings = settings
        self.splits = tuple(splits)
        self.input_shape = (shards.channels, *shards.image_size)
        self.output_dim = settings.ways
        self.chance = 1 / settings.ways
        self._seeds = {"train": train_seed, "val": eval_seed, "test": eval_seed}
        check_splits(shards, settings, self.splits)
        self._mean, self._std = normalisation(shards, settings)
        self._sizes = {split: np.array(shards.split_info(split).images) for split in self.splits}
        self._starts = {split: np.cumsum(sizes) - sizes for split, sizes in self._sizes.items()}
        self._decoded: dict[str, np.ndarray] = {}
        self._may_load = True
        self._kept = self._choose_kept(available_bytes() // 2 // processes)

    @classmethod
    def build(
        cls,
        config: ImageSettings,
        *,
        train_seed: int,
        eval_seed: int,
        root: str | None = None,
        splits: Sequence[str] = SPLITS,
        processes: int = 1,
        progress: Progress | None = None,
    ) -> ImageDomain:
        """The domain over the set at ``root``.

        Args:
            config: ``ImagesConfig``, or other settings of an image domain together with ``root``.
            train_seed: chooses the episodes of ``train``.
            eval_seed: chooses the episodes of ``val`` and ``test``.
            root: folder or URL of the set; None: ``config.root``.
            splits: the splits that will be used; each is checked.
            processes: how many on this machine keep the same data.
            progress: called with bytes done and total while a remote set is downloaded.

        Raises:
            DataError: if the set is missing, damaged, or too small for the episodes that are asked for.
        """
        root = root or getattr(config, "root", None)
        if root is None:
            raise ConfigError("domain.root is not set", "give the folder or URL of a packed set")
        shards = ShardSet.open(root, cache=getattr(config, "cache", None), progress=progress)
        return cls(shards, config, train_seed=train_seed, eval_seed=eval_seed, splits=splits, processes=processes)

    # ------------------------------------------------------------------ episodes

    def episode(self, split: str, index: int) -> Episode:
        settings = self.settings
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"split {split!r} was not prepared ({known} were)", "name it in splits when building")
        rng = episode_rng(self._seeds[split], split, index)
        classes, turns, images = self._draw(rng, split)
        pixels = self._pixels(split, (self._starts[split][classes][:, None] + images).reshape(-1))
        if self._rotates(split):
            pixels = augment.turn(pixels, np.repeat(turns, settings.shots + settings.queries))
        if split == "train":
            pixels = self._augment(rng, pixels)
        return self._assemble(pixels, split, index)

    def episode_classes(self, split: str, index: int) -> list[str]:
        """Names of the classes of an episode in the order of their labels; a turned class says so."""
        rng = episode_rng(self._seeds[split], split, index)
        names = self.shards.split_info(split).classes
        classes, turns, _ = self._draw(rng, split)
        return [names[c] + (f" turned {90 * t} degrees" if t else "") for c, t in zip(classes, turns, strict=True)]

    def _draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Classes ``[ways]``, their quarter turns ``[ways]``, images within the class ``[ways, shots + queries]``."""
        settings, sizes = self.settings, self._sizes[split]
        choice = turned_classes(sizes) if self._rotates(split) else sizes
        classes, images = draw(rng, choice, settings.ways, settings.shots, settings.queries)
        return (*split_turns(classes, len(sizes)), images)

    def _assemble(self, pixels: np.ndarray, split: str, index: int) -> Episode:
        ways, shots, queries = self.settings.ways, self.settings.shots, self.settings.queries
        grouped = torch.from_numpy(np.ascontiguousarray(pixels)).unflatten(0, (ways, shots + queries))
        labels = torch.arange(ways)
        return Episode(
            support=Batch(grouped[:, :shots].flatten(0, 1), labels.repeat_interleave(shots)),
            query=Batch(grouped[:, shots:].flatten(0, 1), labels.repeat_interleave(queries)),
            split=split,
            index=index,
            ways=ways,
        )

    def _augment(self, rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
        chosen = self.settings.augment
        if chosen.flip:
            pixels = augment.flip(rng, pixels)
        if chosen.crop_padding:
            pixels = augment.pad_and_crop(rng, pixels, chosen.crop_padding)
        return pixels

    def _rotates(self, split: str) -> bool:
        return split == "train" and self.settings.augment.rotate_classes

    # ------------------------------------------------------------------ pixels

    def load(self, split: str, progress: Progress | None = None) -> bool:
        """Decodes a split into memory if it fits, once. Call it before worker processes are forked.

        Args:
            split: the split.
            progress: called with images done and total.

        Returns:
            Whether the split is in memory now.

        Raises:
            DataError: naming an image that cannot be decoded, and its shard.
        """
        if split not in self._decoded and self._may_load and self.fits_in_memory(split):
            self._decoded[split] = decode_split(self.shards, split, progress)
        return split in self._decoded

    def suggested_workers(self, split: str) -> int:
        """0 where the split is in memory; else decoding is worth a few processes."""
        return 0 if self.fits_in_memory(split) else min(4, os.cpu_count() or 1)

    def fits_in_memory(self, split: str) -> bool:
        """Whether the decoded split is kept in memory."""
        return self._kept[split]

    def _choose_kept(self, room: int) -> dict[str, bool]:
        """Which splits are kept: each of at most ``settings.memory_gib``, all of at most ``room`` bytes, in order."""
        kept = {}
        for split in self.splits:
            size = self._decoded_bytes(split)
            kept[split] = size <= min(self.settings.memory_gib * _GIB, room)
            room -= size * kept[split]
        return kept

    def _decoded_bytes(self, split: str) -> int:
        return self.shards.num_images(split) * int(np.prod(self.input_shape))

    def _pixels(self, split: str, numbers: np.ndarray) -> np.ndarray:
        """uint8 ``[N, C, H, W]`` of the images with these numbers within the split."""
        # A worker process decodes what it needs: the whole split in each of them would multiply the memory.
        if split not in self._decoded and get_worker_info() is None:
            self.load(split)
        if split in self._decoded:
            return self._decoded[split][numbers]
        first = self.shards.first_image(split)
        return np.stack([self.shards.decode(first + int(number)) for number in numbers])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": {}, "_may_load": False}

    # ------------------------------------------------------------------ meaning

    def prepare(self, episode: Episode, device: torch.device, dtype: torch.dtype) -> Episode:
        episode = episode.to(device)
        return replace(
            episode,
            support=replace(episode.support, inputs=self.normalise(episode.support.inputs, dtype)),
            query=replace(episode.query, inputs=self.normalise(episode.query.inputs, dtype)),
        )

    def normalise(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """``(x / 255 - mean) / std`` of uint8 ``[N, C, H, W]``, on its device, in ``dtype``."""
        mean = torch.tensor(self._mean, dtype=dtype, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self._std, dtype=dtype, device=pixels.device).view(-1, 1, 1)
        return (pixels.to(dtype) / 255 - mean) / std

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    @staticmethod
    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.detach().argmax(dim=-1) == targets).to(outputs.dtype).mean()

    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the shards."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards.info.shards).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What was decided: sizes, statistics, and for each split whether it is kept in memory or streamed."""
        return {
            "name": self.shards.name,
            "root": self.shards.root,
            "folder": str(self.shards.folder),
            "input_shape": list(self.input_shape),
            "mean": list(self._mean),
            "std": list(self._std),
            "splits": {
                split: {
                    "classes": num_classes(self.shards, self.settings, split),
                    "images": self.shards.num_images(split),
                    "bytes": self._decoded_bytes(split),
                    "kept": "memory" if self.fits_in_memory(split) else "streamed",
                }
                for split in self.splits
            },
        }

    def preprocessing(self) -> dict[str, Any]:
        """What ``prepare`` does to pixels: ``(x / 255 - mean) / std`` per channel."""
        return {"mean": list(self._mean), "std": list(self._std)}
