"""Brings an image to the size and mode of its set; leaves its bytes alone where they are right already."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from cml_dist.data.pixels import MODES, Picture, as_png, open_image, to_array
from cml_dist.errors import DataError

_KEPT_FORMATS = {"PNG": "png", "JPEG": "jpg"}
_EXIF_ORIENTATION = 0x0112


def size_and_channels(data: bytes, what: str) -> tuple[tuple[int, int], int]:
    """Height and width as displayed, and 1 channel for grey images, 3 for others."""
    image = ImageOps.exif_transpose(open_image(data, what))
    return (image.height, image.width), 1 if image.mode in ("1", "L", "LA", "I;16", "I;16B", "I;16L") else 3


def fit_image(data: bytes, what: str, image_size: tuple[int, int], channels: int, resize: bool) -> Picture:
    """The image in the size and mode of the set.

    A PNG or JPEG that has them keeps its bytes. Others are turned upright, laid on white where they are transparent,
    scaled to cover the size (bicubic, which averages over the source pixels when it shrinks), cut at the centre, and
    stored as PNG. Without ``resize`` another size than (height, width) is refused.

    Raises:
        DataError: if the image is unreadable, of another size where that is refused, or its range of values unknown.
    """
    image = open_image(data, what)
    mode = MODES[channels]
    upright = image.getexif().get(_EXIF_ORIENTATION) in (None, 0, 1)
    if upright and image.mode == mode and (image.height, image.width) == image_size and image.format in _KEPT_FORMATS:
        return Picture(data, _KEPT_FORMATS[image.format], to_array(image))
    image = _in_mode(image if upright else ImageOps.exif_transpose(image), mode, what)
    if (image.height, image.width) != image_size:
        if not resize:
            raise DataError(
                f"{what} has {image.height}x{image.width} pixels, but others have {image_size[0]}x{image_size[1]}",
                "say to which size to bring all images: --image-size PIXELS",
            )
        image = ImageOps.fit(image, image_size[::-1], method=Image.Resampling.BICUBIC)
    return as_png(to_array(image))


def _in_mode(image: Image.Image, mode: str, what: str) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        what = f"{what} has pixels of mode {image.mode}, whose range is unknown"
        raise DataError(what, "convert it to 8 bits a channel")
    if "transparency" in image.info or image.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert(mode)
