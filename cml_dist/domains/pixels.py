"""Images as bytes and as uint8 arrays ``[C, H, W]``: decode, check, resize, encode."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from cml_dist.errors import DataError

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels that is known here."""


def open_image(data: bytes, what: str) -> Image.Image:
    """A fully decoded Pillow image.

    Args:
        data: the bytes of a PNG, JPEG or other file that Pillow reads.
        what: the name of the image in the error, e.g. its key and shard.

    Raises:
        DataError: if the bytes are no readable image.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow raises many kinds for damaged files, SyntaxError and struct.error among them
        # Pillow's own words for the first name the buffer in memory, by its address.
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{what} cannot be decoded ({reason})", "replace or remove this image") from error
    return image


def decode(data: bytes, what: str, image_size: tuple[int, int], channels: int) -> np.ndarray:
    """Pixels uint8 ``[C, H, W]`` of an image that must have this size and number of channels.

    Raises:
        DataError: if the image is unreadable, or of another size or mode.
    """
    image = open_image(data, what)
    if (image.height, image.width) != image_size:
        raise DataError(
            f"{what} has {image.height}x{image.width} pixels, not {image_size[0]}x{image_size[1]}",
            "pack the images again with one image size",
        )
    if image.mode != MODES[channels]:
        raise DataError(
            f"{what} has mode {image.mode}, not {MODES[channels]} ({channels} channels)",
            "pack the images again with one number of channels",
        )
    return to_array(image)


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels uint8 ``[C, H, W]`` of an image of mode L or RGB."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def encode_png(image: Image.Image) -> bytes:
    """The image as PNG, the same bytes each time (no time stamps, no metadata)."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, format="PNG", optimize=False, compress_level=6)
    return buffer.getvalue()
