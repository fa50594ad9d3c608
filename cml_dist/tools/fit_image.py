"""Brings an image to the size and mode of its set; leaves its bytes alone where they are right already."""

from __future__ import annotations

import numpy as np

from cml_dist.data.pixels import MODES, Picture, as_png, open_image, read_pixels, to_array
from cml_dist.errors import DataError

_KEPT_FORMATS = {"PNG": "png", "JPEG": "jpg"}


def fit_image(data: bytes, what: str, image_size: tuple[int, int], channels: int, resize: bool) -> Picture:
    """The image as :func:`cml_dist.data.pixels.read_pixels` reads it, in the size (height, width) of the set.

    A PNG or JPEG keeps its bytes where anybody would read these pixels from it; others are stored as PNG.

    Raises:
        DataError: if the image is unreadable, its range of values unknown, or without ``resize`` of another size.
    """
    image = open_image(data, what)
    pixels = read_pixels(image, what, channels, image_size if resize else None)
    if pixels.shape[1:] != image_size:
        raise DataError(
            f"{what} has {pixels.shape[2]}x{pixels.shape[1]} pixels, but others have {image_size[1]}x{image_size[0]}",
            "say to which size to bring all images: --image-size PIXELS",
        )
    if image.format in _KEPT_FORMATS and image.mode == MODES[channels] and np.array_equal(to_array(image), pixels):
        return Picture(data, _KEPT_FORMATS[image.format], pixels)
    return as_png(pixels)
