"""What an episode draws from its own generator: classes, images without replacement, changes of training images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cml_dist.data.pixels import to_array, to_image

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601


def draw(
    rng: np.random.Generator, class_sizes: np.ndarray, ways: int, images: int, version: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Draws class numbers ``[ways]``, and image numbers within their class ``[ways, images]``, both int64.

    Without replacement; ``class_sizes`` are the images of each class, at least ``images``.

    Args:
        version: with 2 the first images are the same, and as much of ``rng`` is used, however many are asked for.
    """
    classes = rng.choice(len(class_sizes), size=ways, replace=False)
    sizes = [int(class_sizes[c]) for c in classes]
    if version == 1:
        numbers = np.stack([rng.choice(size, size=images, replace=False) for size in sizes])
    else:
        numbers = np.stack([rng.permutation(size)[:images] for size in sizes])
    return classes.astype(np.int64), numbers.astype(np.int64)


def draw_unlabelled(
    rng: np.random.Generator,
    class_sizes: np.ndarray,
    classes: np.ndarray,
    images: np.ndarray,
    unlabelled: int,
    distractors: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws class numbers ``[ways + distractors]``, an episode's and others, and image numbers ``[.., unlabelled]``.

    Args:
        classes, images: the episode's own, as :func:`draw` gives them: none of these images is drawn again.
    """
    others = rng.choice(np.setdiff1d(np.arange(len(class_sizes)), classes), distractors, replace=False)
    taken = [*images, *[np.empty(0, int)] * distractors]
    found = np.concatenate([classes, others])
    left = (np.setdiff1d(np.arange(class_sizes[c]), own) for c, own in zip(found, taken, strict=True))
    return found, np.stack([rng.choice(numbers, unlabelled, replace=False) for numbers in left])


def turn(images: np.ndarray, quarter_turns: np.ndarray) -> np.ndarray:
    """Turns each square image uint8 ``[N, C, S, S]`` counter-clockwise by its number of quarter turns ``[N]``."""
    turned = images.copy()
    for turns in (1, 2, 3):
        chosen = quarter_turns == turns
        turned[chosen] = np.rot90(images[chosen], turns, axes=(-2, -1))
    return turned


def flip(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Mirrors each image uint8 ``[N, C, H, W]`` left-right with probability 1/2."""
    chosen = rng.random(len(images)) < 0.5
    flipped = images.copy()
    flipped[chosen] = images[chosen][..., ::-1]
    return flipped


def pad_and_crop(rng: np.random.Generator, images: np.ndarray, padding: int) -> np.ndarray:
    """Pads each image uint8 ``[N, C, H, W]`` by reflection and crops it back to its size at a random place."""
    height, width = images.shape[-2:]
    top, left = rng.integers(0, 2 * padding + 1, size=(2, len(images)))
    border = (padding, padding)
    padded = np.pad(images, ((0, 0), (0, 0), border, border), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(-2, -1))
    return np.ascontiguousarray(windows[np.arange(len(images)), :, top, left])


def crop_and_resize(rng: np.random.Generator, images: np.ndarray, scale: float) -> np.ndarray:
    """Cuts a random window out of each image uint8 ``[N, C, H, W]``, and scales it back to the image's size, bilinear.

    Its part of the area is uniform in [scale, 1], the logarithm of its aspect in that of [3/4, 4/3]; the first of ten
    windows counts that is not larger than the image, which stays whole where all are.

    *Source*: Szegedy et al. 2015, section 6, as torchvision's RandomResizedCrop. By Pillow, which computes in integers:
    the bits are those of any other machine, and of other vector instructions.
    """
    size = np.array(images.shape[-2:])
    area, aspect = rng.random((2, len(images), 10))
    area, aspect = (scale + (1 - scale) * area) * size.prod(), (4 / 3) ** (2 * aspect - 1)
    sides = np.rint(np.sqrt(np.stack([area / aspect, area * aspect], axis=-1))).clip(1)
    sides = np.concatenate([sides, np.broadcast_to(size, (len(images), 1, 2))], axis=1)
    fits = (sides <= size).all(axis=-1)
    sides = sides[np.arange(len(images)), fits.argmax(axis=1)]
    corners = np.floor(rng.random(sides.shape) * (size - sides + 1))
    windows = np.stack([corners, corners + sides], axis=-1).astype(int)
    cut = [image[:, slice(*rows), slice(*columns)] for image, (rows, columns) in zip(images, windows, strict=True)]
    return np.stack([to_array(to_image(one).resize(size[::-1], Image.Resampling.BILINEAR)) for one in cut])


def jitter(rng: np.random.Generator, images: np.ndarray, strength: float) -> np.ndarray:
    """Changes brightness, then contrast, then saturation of each image uint8 ``[N, 1 or 3, H, W]``.

    Each by a factor of its own, uniform in [1 - strength, 1 + strength]: what differs from black, from the image's mean
    luma and from each pixel's luma is multiplied. Saturation leaves grey images as they are.

    *Source*: Chen et al. 2019 (A Closer Look at Few-shot Classification), strength 0.4; here without rounding in
    between.
    """
    factors = (1 + strength * (2 * rng.random((3, len(images))) - 1)).astype(np.float32)
    changed, weights = images.astype(np.float32), _LUMA if images.shape[1] == 3 else np.ones(1, np.float32)
    for image, each in zip(changed, factors.T, strict=True):
        for number, factor in enumerate(each):
            kept = sum(w * channel for w, channel in zip(weights, image, strict=True)) if number else np.float32(0)
            if number == 1:  # of whole numbers: the same whatever is summed first
                kept = np.rint(kept).mean(dtype=np.float64).astype(np.float32)
            np.clip(kept + factor * (image - kept), 0, 255, out=image)
    return np.rint(changed).astype(np.uint8)
