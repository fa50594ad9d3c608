"""Changes to training images: uint8 in, uint8 out, drawn from the episode's own generator."""

from __future__ import annotations

import numpy as np


def flip(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Mirrors each image ``[N, C, H, W]`` left-right with probability 1/2."""
    chosen = rng.random(len(images)) < 0.5
    flipped = images.copy()
    flipped[chosen] = images[chosen][..., ::-1]
    return flipped


def pad_and_crop(rng: np.random.Generator, images: np.ndarray, padding: int) -> np.ndarray:
    """Pads each image ``[N, C, H, W]`` by reflection and crops it back to its size at a random place."""
    height, width = images.shape[-2:]
    top, left = rng.integers(0, 2 * padding + 1, size=(2, len(images)))
    border = (padding, padding)
    padded = np.pad(images, ((0, 0), (0, 0), border, border), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(-2, -1))
    return np.ascontiguousarray(windows[np.arange(len(images)), :, top, left])


def turn(images: np.ndarray, quarter_turns: np.ndarray) -> np.ndarray:
    """Turns each square image ``[N, C, S, S]`` counter-clockwise by its number of quarter turns ``[N]``."""
    turned = images.copy()
    for turns in (1, 2, 3):
        chosen = quarter_turns == turns
        turned[chosen] = np.rot90(images[chosen], turns, axes=(-2, -1))
    return turned
