"""Images as bytes and as uint8 arrays ``[C, H, W]``: decode, check, encode, and many of them by threads."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cml_dist.data.cores import usable_cores
from cml_dist.errors import DataError

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels that is known here."""

_GREY = ("1", "L", "LA", "La", "I", "F")  # and what begins with I;16
# What Pillow identifies but cannot turn into pixels, or only by starting another program (EPS).
_NO_PIXELS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF

_MAX_THREADS = 8
_CHUNK, _AHEAD = 32, 1024  # images a thread takes at once; results that are held at most

_A = TypeVar("_A")
_B = TypeVar("_B")


class Picture(NamedTuple):
    """An image ready to be stored: the bytes of a ``png`` or ``jpg`` file, and its pixels uint8 ``[C, H, W]``."""

    data: bytes
    ext: str
    pixels: np.ndarray


@cache
def _formats() -> tuple[str, ...]:
    """What Pillow itself can decode."""
    Image.preinit()  # the common ones are tried first
    Image.init()
    return tuple(kind for kind in Image.ID if kind not in _NO_PIXELS)


def picture_suffixes() -> frozenset[str]:
    """The suffixes of these formats, with their dot, in lower case."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _formats())


def open_image(data: bytes, what: str) -> Image.Image:
    """A fully decoded Pillow image; ``what`` names it in the error, e.g. by its key and shard.

    Raises:
        DataError: if the bytes are no readable image.
    """
    with _undecodable(what):
        image = Image.open(io.BytesIO(data), formats=_formats())
        image.load()
    return image


def size_and_channels(data: bytes, what: str) -> tuple[tuple[int, int], int]:
    """Height and width as displayed, and 1 channel for grey images, 3 for others; most formats are not decoded for it.

    A palette is grey where all its colours are.

    Raises:
        DataError: if the bytes are no image.
    """
    with _undecodable(what):
        image = Image.open(io.BytesIO(data), formats=_formats())
        is_grey = image.mode in _GREY or image.mode.startswith("I;16")
        if image.mode in ("P", "PA"):
            is_grey = not np.ptp(np.reshape(image.getpalette("RGB"), (-1, 3)), axis=1).any()
        if image.width != image.height and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE:
            image = ImageOps.exif_transpose(image)  # not by hand: Pillow turns some formats by itself
    return (image.height, image.width), 1 if is_grey else 3


def file_bytes(path: str | Path) -> bytes:
    """What is in a file; DataError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", "check the path") from error


def read_pixels(
    source: bytes | Image.Image, what: str, channels: int, image_size: tuple[int, int] | None = None
) -> np.ndarray:
    """The one reading of a picture: uint8 ``[C, H, W]`` of a file's bytes, or of an image that Pillow has opened.

    - Turned upright, as EXIF says; of an animation or of several pages the first.
    - 16 bits a channel: the high byte. 32-bit integers and floats are refused, since nothing says their range.
    - A palette stands for its colours, CMYK and other colour spaces for RGB (colour profiles are not applied), and what
      is transparent for white behind it.
    - Colour in a grey set is its luma (ITU-R 601), grey in a colour set three equal channels.
    - Of another size than ``image_size`` (height, width): scaled to cover it and cut at the centre, never squeezed;
      bicubic, which averages over the source pixels when it shrinks. None: the size that it has.

    Args:
        what: names it in errors.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        DataError: if it is unreadable, or its range of values unknown.
    """
    image = open_image(source, what) if isinstance(source, bytes) else source
    with _undecodable(what):
        image.load()  # a PNG may say only at its end how it is turned
        # Without any metadata nothing can turn it: to ask takes a tenth of the time of a small image.
        upright = not image.info or image.getexif().get(_ORIENTATION, 1) == 1
        if not upright or image.mode != MODES[channels] or "transparency" in image.info:
            format = image.format  # which an image that was turned has lost
            image = _in_mode(image if upright else ImageOps.exif_transpose(image), MODES[channels], format, what)
        if image_size is not None and (image.height, image.width) != image_size:
            image = ImageOps.fit(image, image_size[::-1], method=Image.Resampling.BICUBIC)
        return to_array(image)


def resized(pixels: np.ndarray, image_size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Pixels uint8 ``[C, H, W]`` scaled to cover another size (height, width), and cut at the centre.

    Averages over the source pixels when it shrinks. In whole numbers, by Pillow: the same bits on any machine.

    Args:
        interpolation: one of :data:`cml_dist.types.INTERPOLATIONS`.
    """
    if pixels.shape[1:] == image_size:
        return pixels
    method = Image.Resampling[interpolation.upper()]
    return to_array(ImageOps.fit(to_image(pixels), image_size[::-1], method=method))


def _in_mode(image: Image.Image, mode: str, format: str | None, what: str) -> Image.Image:
    # Of PNG and PGM Pillow may give 16 bits as mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
        values = np.asarray(image)
        white = values == image.info.get("transparency", -1)  # the one value that such a PNG may call transparent
        image = Image.fromarray(np.where(white, 255, values >> 8).astype(np.uint8))
    elif image.mode[0] in ("I", "F"):
        what = f"{what} has pixels of mode {image.mode}, whose range is unknown"
        raise DataError(what, "convert it to 8 bits a channel")
    if "transparency" in image.info or image.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB" if image.mode not in _GREY else mode).convert(mode)


@contextmanager
def _undecodable(what: str) -> Iterator[None]:
    """Turn what Pillow raises for damaged files (SyntaxError and struct.error among it) into DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # Pillow's own words name the buffer in memory, by its address.
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{what} cannot be decoded ({reason})", "replace or remove this image") from error


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
    with ThreadPoolExecutor(min(_MAX_THREADS, usable_cores())) as pool:
        for start in range(0, len(arguments), _AHEAD):
            window = arguments[start : start + _AHEAD]
            chunks = [window[place : place + _CHUNK] for place in range(0, len(window), _CHUNK)]
            for results in pool.map(lambda chunk: [function(argument) for argument in chunk], chunks):
                yield from results
