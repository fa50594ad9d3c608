"""Brings an image to the size and mode of its set; leaves its bytes alone where they are right already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from cml_dist.domains.pixels import MODES, encode_png, open_image, to_array
from cml_dist.errors import DataError

_KEPT_FORMATS = {"PNG": "png", "JPEG": "jpg"}
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = (None, 0, 1)


@dataclass(frozen=True)
class Fitted:
    """An image ready to be stored.

    Attributes:
        data: the bytes of the file.
        ext: ``"png"`` or ``"jpg"``.
        pixels: uint8 ``[C, H, W]``.
        kept: whether ``data`` are the bytes of the source.
    """

    data: bytes
    ext: str
    pixels: np.ndarray
    kept: bool


def size_and_channels(data: bytes, what: str) -> tuple[tuple[int, int], int]:
    """Height and width as displayed, and 1 channel for grey images, 3 for others."""
    image = open_image(data, what)
    size = (image.height, image.width)
    if _orientation(image) in (5, 6, 7, 8):  # lying on its side
        size = size[::-1]
    return size, 1 if image.mode in ("1", "L", "LA", "I;16", "I;16B", "I;16L") else 3


def fit_image(data: bytes, what: str, image_size: tuple[int, int], channels: int, resize: bool) -> Fitted:
    """The image in the size and mode of the set.

    A PNG or JPEG that has them keeps its bytes. Others are turned upright, laid on white where they are transparent,
    scaled to cover the size (bicubic, which averages over the source pixels when it shrinks), cut at the centre, and
    stored as PNG.

    Args:
        data: the bytes of the source file.
        what: the name of the image, for errors.
        image_size: height and width.
        channels: 1 or 3.
        resize: whether another size is changed, or refused.

    Raises:
        DataError: if the image is unreadable, of another size where that is refused, or in colour where grey is meant.
    """
    image = open_image(data, what)
    mode = MODES[channels]
    upright = _orientation(image) in _UPRIGHT
    if upright and image.mode == mode and (image.height, image.width) == image_size and image.format in _KEPT_FORMATS:
        return Fitted(data, _KEPT_FORMATS[image.format], to_array(image), kept=True)
    image = _in_mode(image if upright else ImageOps.exif_transpose(image), mode, what)
    if (image.height, image.width) != image_size:
        if not resize:
            raise DataError(
                f"{what} has {image.height}x{image.width} pixels, but others have {image_size[0]}x{image_size[1]}",
                "say to which size to bring all images: --image-size PIXELS",
            )
        image = ImageOps.fit(image, image_size[::-1], method=Image.Resampling.BICUBIC)
    return Fitted(encode_png(image), "png", to_array(image), kept=False)


def _orientation(image: Image.Image) -> int | None:
    return image.getexif().get(_EXIF_ORIENTATION)


def _in_mode(image: Image.Image, mode: str, what: str) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(
            f"{what} has pixels of mode {image.mode}, whose range is unknown", "convert it to 8 bits a channel"
        )
    if "transparency" in image.info or image.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert(mode)
