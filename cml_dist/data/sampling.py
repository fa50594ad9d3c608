"""What an episode draws from its own generator: classes, images without replacement, changes of training images."""

from __future__ import annotations

import numpy as np


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
