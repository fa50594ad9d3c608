"""Images as bytes and as uint8 arrays ``[C, H, W]``: decode, check, encode, and many of them by threads."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from cml_dist.errors import DataError

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels that is known here."""

_MAX_THREADS = 8
_CHUNK, _AHEAD = 32, 1024  # images a thread takes at once; results that are held at most

_A = TypeVar("_A")
_B = TypeVar("_B")


class Picture(NamedTuple):
    """An image ready to be stored: the bytes of a ``png`` or ``jpg`` file, and its pixels uint8 ``[C, H, W]``."""

    data: bytes
    ext: str
    pixels: np.ndarray


def open_image(data: bytes, what: str) -> Image.Image:
    """A fully decoded Pillow image; ``what`` names it in the error, e.g. by its key and shard.

    Raises:
        DataError: if the bytes are no readable image.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow raises many kinds for damaged files, SyntaxError and struct.error among them
        # Pillow's own words name the buffer in memory, by its address.
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{what} cannot be decoded ({reason})", "replace or remove this image") from error
    return image


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels uint8 ``[C, H, W]`` of an image of mode L or RGB."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_image(pixels: np.ndarray) -> Image.Image:
    """The image of mode L or RGB with these pixels, uint8 ``[C, H, W]``."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def as_png(pixels: np.ndarray) -> Picture:
    """Pixels uint8 ``[C, H, W]`` as a PNG, the same bytes each time (no time stamps, no metadata)."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, format="PNG", optimize=False, compress_level=6)
    return Picture(buffer.getvalue(), "png", pixels)


def in_threads(function: Callable[[_A], _B], arguments: Sequence[_A]) -> Iterator[_B]:
    """Results in order, computed by threads a bounded number ahead (Pillow works outside the interpreter lock).

    In chunks, for a small image takes less time to decode than a thread takes to be woken.
    """
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for start in range(0, len(arguments), _AHEAD):
            window = arguments[start : start + _AHEAD]
            chunks = [window[place : place + _CHUNK] for place in range(0, len(window), _CHUNK)]
            for results in pool.map(lambda chunk: [function(argument) for argument in chunk], chunks):
                yield from results
