"""Few-shot episodes of images from a shard set: classification with cross-entropy and accuracy."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from cml_dist.config.schema import ImageSettings
from cml_dist.data import sampling
from cml_dist.data.as_trained import size_read
from cml_dist.data.base import SPLITS, ClassificationDomain, ModelInputs, Progress, episode_rng, unlabelled_rng
from cml_dist.data.cores import usable_cores
from cml_dist.data.free_memory import available_bytes
from cml_dist.data.groups import draw_parted
from cml_dist.data.pixels import in_threads, resized
from cml_dist.data.shards import ShardSet
from cml_dist.errors import ConfigError, DataError
from cml_dist.types import Batch, Episode

_GIB = 2**30
_REPORT_EVERY = 256  # images between two progress reports
_TRIED = 10  # episodes of a set with groups that are drawn, without their images, before the first counts


class ImageDomain(ClassificationDomain):
    """N-way K-shot episodes over the classes of a packed image set, which is at ``settings.root``.

    Labels are ``0..ways-1`` in the order in which the classes were drawn; support and query are ordered class by class.
    A split is decoded once and kept as uint8 where it fits ``settings.memory_gib`` and this process's part of half the
    memory that is free now; else each episode decodes its own images. Either way an episode is the same. The object can
    be pickled and forked; decoded splits are inherited by a fork, and not pickled.

    Args:
        seeds: of each split.
        processes: how many on this machine keep the same data, and share its memory.

    Raises:
        DataError: if the set is missing or damaged.
    """

    def __init__(
        self, settings: ImageSettings, seeds: Mapping[str, int], processes: int = 1, progress: Progress | None = None
    ) -> None:
        self.shards = shards = ShardSet.open(settings.root, getattr(settings, "cache", None), progress)
        self.settings = settings
        self.packed_size = self._fitted_to = shards.image_size
        self.input_shape = (shards.channels, *size_read(settings.size, self.packed_size, None))
        self._interpolation = "bicubic"
        batches = settings.batch and "train" in shards.splits  # a set to be tested on needs no training split
        classes = len(shards.split_info("train").classes) if batches else settings.ways
        self.output_dim = classes * (4 if settings.batch and settings.augment.rotate_classes else 1)
        self.chance = 1 / settings.ways
        self._seeds = seeds
        self._mean, self._std = settings.mean or shards.info.mean, settings.std or shards.info.std
        self._has_fixed_ways = False
        self._sizes = {split: np.array(shards.split_info(split).images) for split in shards.splits}
        self._groups = {split: shards.class_groups(split) for split in shards.splits}
        self._starts = {split: np.cumsum(sizes) - sizes for split, sizes in self._sizes.items()}
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, int))
        self._decoded: dict[str, np.ndarray] = {}
        self._features: dict[str, np.ndarray] = {}
        self._kept: dict[str, bool] = {}
        room = available_bytes() // 2 // processes
        for split in shards.splits:  # those that come first are kept first
            size = self._decoded_bytes(split)
            self._kept[split] = size <= min(settings.memory_gib * _GIB, room)
            room -= size * self._kept[split]

    # ------------------------------------------------------------------ what must hold before the first episode

    def check_splits(self, splits: Collection[str]) -> None:
        """Refuse splits that cannot fill an episode, and images that cannot be normalised.

        Raises:
            DataError: a split is missing or has too few classes, or a class too few images (named).
            ConfigError: mean and std do not fit the images.
        """
        settings, name, (height, width) = self.settings, self.shards.name, self.shards.image_size
        if settings.augment.rotate_classes and height != width:
            raise ConfigError(
                f"domain.augment.rotate_classes needs square images, but those of {name} are {width}x{height} px",
                "set domain.augment.rotate_classes=false",
            )
        for split in splits:
            if settings.batch and split == "train":
                if (count := self._num_images()) < settings.batch:
                    what = f"domain.batch is {settings.batch}, but {name} has {count} training images"
                    raise DataError(what, f"lower domain.batch to at most {count}")
                continue
            info, groups = self.shards.split_info(split), self._groups[split]
            count = self._num_classes(split)
            if count < settings.ways + (others := settings.distractors):
                beside = f" and domain.distractors {others}" * bool(others)
                what = f"domain.ways is {settings.ways}{beside}, but split {split!r} of {name} has {count} classes"
                fewer = f"lower domain.ways{' + distractors' * bool(others)} to at most {count}"
                raise DataError(what, f"use a set with {settings.ways}" if self._has_fixed_ways else fewer)
            if groups is not None and settings.unlabelled:
                raise ConfigError(
                    f"domain.unlabelled is {settings.unlabelled}, but {name} has groups of images (--group-by), and an "
                    "unlabelled image could be of a query image's group",
                    "set domain.unlabelled=0, or use a set without groups",
                )
            if short := self.shards.short_classes(split, settings.shots, settings.queries + settings.unlabelled):
                named = ", ".join(f"{info.classes[n]!r} has {info.images[n]}" for n in short[:3])
                more = f" and {len(short) - 3} more classes have too few" if len(short) > 3 else ""
                whole = "" if groups is None else ", those of a group for one of both"
                further = settings.unlabelled
                too = " + unlabelled" * bool(further)
                lower = f"shots + queries{too} to at most {min(info.images)}" if groups is None else "shots or queries"
                raise DataError(
                    f"an episode takes {settings.shots} + {settings.queries}{f' + {further}' * bool(further)} images a "
                    f"class (domain.shots + domain.queries{too}{whole}), but in split {split!r} of {name} "
                    f"class {named}{more}",
                    f"lower {lower}, or leave these classes out",
                )
            for index in range(_TRIED if groups else 0):  # classes may share groups: a set that cannot be is found here
                self._draw(episode_rng(self._seeds[split], split, index), split)
        channels = self.shards.channels
        for key, value in (("mean", self._mean), ("std", self._std)):
            if value is None or len(value) != channels:
                found = "not set, and was not measured" if value is None else f"{len(value)} numbers"
                raise ConfigError(
                    f"domain.{key} is {found}, but images of {name} have {channels} channels",
                    f"set domain.{key} to {channels} numbers, or null where the set has a training split",
                )
        if min(self._std) <= 0:
            raise ConfigError(f"the measured std of {name} is {self._std}: a channel is constant", "set domain.std")

    def adopt(self, trained: ModelInputs) -> str | None:
        """Read images as a model does: scaled as it was trained, and normalised by its mean and std where none are set.

        Says so where these are not those of the set.

        Raises:
            DataError: size, channels or number of classes are not those of the model.
        """
        name, shape = self.shards.name, trained.input_shape
        if trained.packed_size is not None:
            self._fitted_to, self._interpolation = trained.packed_size, trained.interpolation
            if not isinstance(self.settings.size, int):
                self.input_shape = (self.shards.channels, *shape[1:])
        if len(shape) == 3 and shape != self.input_shape:
            options = []
            if shape[1:] != self.input_shape[1:]:
                options.append(f"--image-size {shape[1]}" if shape[1] == shape[2] else f"image_size={shape[1:]}")
            if shape[0] != self.shards.channels:
                options.append(f"--channels {shape[0]}")
            sizes = f"{_in_words(self.input_shape)}, but the network reads {_in_words(shape)}"
            raise DataError(f"the images of {self.shards.root} are {sizes}", f"pack them with {' '.join(options)}")
        if self.settings.batch and trained.output_dim is not None:
            self.output_dim = trained.output_dim  # a test needs none of the classifier's outputs
        super().adopt(trained)
        self._has_fixed_ways, own = trained.output_dim is not None, (self._mean, self._std)
        self._mean = self.settings.mean or trained.mean or self._mean
        self._std = self.settings.std or trained.std or self._std
        if own == (self._mean, self._std):
            return None
        ours, theirs = (f"mean {_rounded(m)}, std {_rounded(s)}" for m, s in ((self._mean, self._std), own))
        return f"Images are normalised as those of the run were ({ours}), not as {name} was measured ({theirs})"

    # ------------------------------------------------------------------ episodes

    def episode(self, split: str, index: int) -> Episode:
        settings = self.settings
        if settings.batch and split == "train":
            return self._batch(index, settings.batch)
        ways, shots, queries, version = settings.ways, settings.shots, settings.queries, settings.draw or 2
        rng = episode_rng(self._seeds[split], split, index)
        classes, images = self._draw(rng, split)
        pixels = self._drawn(split, classes, images)
        if version == 1:
            pixels = self._changed(rng, split, pixels)
        grouped = pixels.reshape(ways, shots + queries, *pixels.shape[1:])
        batches = []
        for part in (grouped[:, :shots], grouped[:, shots:]):
            changed = part.reshape(-1, *pixels.shape[1:])
            # The support set's first: what the query set draws is then nothing to it.
            changed = changed if version == 1 else self._changed(rng, split, changed)
            labels = torch.arange(ways).repeat_interleave(part.shape[1])
            batches.append(Batch(self._read(split, changed), labels))
        unlabelled = self._unlabelled(split, index, classes, images) if settings.unlabelled else None
        return Episode(*batches, split, index, ways=ways, unlabelled=unlabelled)

    def _drawn(self, split: str, classes: np.ndarray, images: np.ndarray) -> np.ndarray:
        """The images of these numbers ``[N, each]``, of classes ``[N]`` as :meth:`_draw` numbers them."""
        turns, classes = np.divmod(classes, len(self._sizes[split]))
        pixels = self._pixels(split, (self._starts[split][classes][:, None] + images).reshape(-1))
        return sampling.turn(pixels, np.repeat(turns, images.shape[1])) if self._rotates(split) else pixels

    def _read(self, split: str, pixels: np.ndarray) -> Tensor:
        """In the network's size."""
        scaled = pixels if split in self._features else self._scaled(pixels)
        return torch.from_numpy(np.ascontiguousarray(scaled))

    def _unlabelled(self, split: str, index: int, classes: np.ndarray, images: np.ndarray) -> Batch:
        """Further images of an episode's classes, and of others that are not in it."""
        rng, sizes = unlabelled_rng(self._seeds[split], split, index), self._sizes[split]
        sizes, count = np.tile(sizes, 4 if self._rotates(split) else 1), self.settings.unlabelled
        drawn = sampling.draw_unlabelled(rng, sizes, classes, images, count, self.settings.distractors)
        pixels = self._changed(rng, split, self._drawn(split, *drawn))
        return Batch(self._read(split, pixels), torch.full((len(pixels),), -1))

    def _draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of classes ``[ways]`` and of their images; class c turned by t quarter turns is c + t * classes."""
        settings, groups = self.settings, self._groups[split]
        times = 4 if self._rotates(split) else 1
        if groups is not None:
            return draw_parted(rng, groups * times, settings.ways, settings.shots, settings.queries)
        images = settings.shots + settings.queries
        return sampling.draw(rng, np.tile(self._sizes[split], times), settings.ways, images, settings.draw or 2)

    def _batch(self, index: int, size: int) -> Episode:
        """Training images with the numbers of their classes, as a query set: each once in an epoch, the rest left out.

        An epoch's order is a pure function of (seed, epoch), and what changes an image of (seed, index).
        """
        seed, sizes = self._seeds["train"], self._sizes["train"]
        epoch, place = divmod(index, self._num_images() // size)
        if self._epoch[0] != epoch:
            entropy = np.random.SeedSequence([seed, SPLITS.index("train"), epoch, size])
            self._epoch = epoch, np.random.Generator(np.random.PCG64(entropy)).permutation(self._num_images())
        turns, numbers = np.divmod(self._epoch[1][place * size :][:size], sizes.sum())
        pixels = self._pixels("train", numbers)
        if self._rotates("train"):
            pixels = sampling.turn(pixels, turns)
        pixels = self._changed(episode_rng(seed, "train", index), "train", pixels)
        pixels = pixels if "train" in self._features else self._scaled(pixels)
        labels = np.searchsorted(self._starts["train"], numbers, "right") - 1 + turns * len(sizes)
        query = Batch(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels))
        return Episode(query.map(lambda values: values[:0]), query, "train", index, ways=self.output_dim)

    def _num_images(self) -> int:
        """Of the training split; each counts four times where classes are turned."""
        return int(self._sizes["train"].sum()) * (4 if self._rotates("train") else 1)

    def _changed(self, rng: np.random.Generator, split: str, images: np.ndarray) -> np.ndarray:
        """Training images uint8 ``[N, C, H, W]`` changed at random, as configured."""
        augment = self.settings.augment
        if split == "train" and augment.flip:
            images = sampling.flip(rng, images)
        if split == "train" and augment.crop_padding:
            images = sampling.pad_and_crop(rng, images, augment.crop_padding)
        if split == "train" and augment.random_resized_crop < 1:
            images = sampling.crop_and_resize(rng, images, augment.random_resized_crop)
        if split == "train" and augment.color_jitter:
            images = sampling.jitter(rng, images, augment.color_jitter)
        return images

    def _scaled(self, images: np.ndarray) -> np.ndarray:
        if images.shape[2:] == self.input_shape[1:]:
            return images
        return np.stack([resized(image, self.input_shape[1:], self._interpolation) for image in images])

    def _rotates(self, split: str) -> bool:
        return split == "train" and self.settings.augment.rotate_classes

    def _num_classes(self, split: str) -> int:
        """Classes that episodes are drawn from: four times those of the training split where classes are turned."""
        return (4 if self._rotates(split) else 1) * len(self.shards.split_info(split).classes)

    # ------------------------------------------------------------------ pixels

    def load(self, split: str, progress: Progress | None = None) -> bool:
        """Decodes a split into memory if it fits, once; call it before worker processes are forked.

        Raises:
            DataError: naming an image that cannot be decoded, and its shard.
        """
        if split in self._decoded or split in self._features or not self._kept[split]:
            return split in self._decoded or split in self._features
        first, count = self.shards.first_image(split), self.shards.num_images(split)
        pixels = np.empty((count, self.shards.channels, *self.packed_size), dtype=np.uint8)
        for number, image in enumerate(in_threads(self.shards.decode, range(first, first + count))):
            pixels[number] = image
            if progress is not None and ((number + 1) % _REPORT_EVERY == 0 or number + 1 == count):
                progress(number + 1, count, f"decoding {split} images")
        self._decoded[split] = pixels
        return True

    def suggested_workers(self, split: str) -> int:
        """0 where the split is in memory and changed at little cost; else an episode is worth a few processes."""
        if split in self._features:
            return 0
        augment = self.settings.augment
        is_costly = split == "train" and (augment.random_resized_crop < 1 or augment.color_jitter > 0)
        is_costly = is_costly or self.input_shape[1:] != self.packed_size
        return 0 if self._kept[split] and not is_costly else min(4, usable_cores())

    def _decoded_bytes(self, split: str) -> int:
        return self.shards.num_images(split) * self.shards.channels * int(np.prod(self.packed_size))

    def images(self, split: str, numbers: range) -> np.ndarray:
        """uint8 ``[N, C, H, W]`` of images of a split by number, in the network's size; decoded now, by threads."""
        first = self.shards.first_image(split)
        return self._scaled(np.stack(list(in_threads(self.shards.decode, [first + number for number in numbers]))))

    def keep(self, split: str, features: np.ndarray) -> None:
        """From now on episodes of a split give these in place of images: ``[images, K]``, in their order."""
        self._features[split] = features

    def _pixels(self, split: str, numbers: np.ndarray) -> np.ndarray:
        """uint8 ``[N, C, H, W]`` of the images with these numbers within the split, as they are packed; or features."""
        if split in self._features:
            return self._features[split][numbers]
        # A worker process decodes what it needs: the whole split in each of them would multiply the memory.
        if split not in self._decoded and get_worker_info() is None:
            self.load(split)
        if split in self._decoded:
            return self._decoded[split][numbers]
        first = self.shards.first_image(split)
        return np.stack([self.shards.decode(first + int(number)) for number in numbers])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": {}}

    # ------------------------------------------------------------------ meaning

    def prepare(self, episode: Episode, device: torch.device, dtype: torch.dtype) -> Episode:
        episode = episode.to(device)
        return episode.each(lambda batch: replace(batch, inputs=self.normalise(batch.inputs, dtype)))

    def normalise(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """``(x / 255 - mean) / std`` of uint8 ``[N, C, H, W]``, on its device, in ``dtype``; features as they are."""
        if pixels.is_floating_point():
            return pixels.to(dtype)
        # Made on the CPU and sent: made on a GPU, each would wait for all that it has to do.
        sent = (torch.tensor(v, dtype=dtype).view(-1, 1, 1) for v in (self._mean, self._std))
        mean, std = (v.to(pixels.device, non_blocking=True) for v in sent)
        return (pixels.to(dtype) / 255 - mean) / std

    def largest_episode(self, dtype: torch.dtype) -> Episode | None:
        if "train" not in self._features:
            return None
        made = self.prepare(self.episode("train", 0), torch.device("cpu"), dtype)
        return made.map(lambda tensor: tensor.to("meta"))

    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the shards, and of the index where it has groups."""
        info = self.shards.info
        files = info.shards if info.group_by is None else (*info.shards, info.index)
        return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()

    def class_names(self, split: str) -> Sequence[str]:
        return self.shards.split_info(split).classes if split in self.shards.splits else ()

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.shards.name,
            "root": self.shards.root,
            "folder": str(self.shards.folder),
            "input_shape": list(self.input_shape),
            **self.preprocessing(),
            "splits": {
                split: {
                    "classes": self._num_classes(split),
                    "images": self.shards.num_images(split),
                    "bytes": self._features[split].nbytes if split in self._features else self._decoded_bytes(split),
                    "kept": "features" if split in self._features else "memory" if self._kept[split] else "streamed",
                }
                for split in self.shards.splits
            },
        }

    def model_inputs(self) -> ModelInputs:
        known: dict[str, Any] = {"mean": self._mean, "std": self._std}
        if self._fitted_to != self.input_shape[1:]:
            known |= {"packed_size": self._fitted_to, "interpolation": self._interpolation}
        return super().model_inputs().model_copy(update=known)


def _in_words(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{f'{width} px' if height == width else f'{width}x{height} px'} in {'grey' if channels == 1 else 'colour'}"


def _rounded(values: tuple[float, ...] | None) -> str:
    return " ".join(f"{value:.4f}" for value in values or ()) or "none"
