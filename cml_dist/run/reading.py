"""Examples as an exported network reads them: pictures from paths, Pillow or arrays, and vectors of regression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cml_dist.data.pixels import file_bytes, read_pixels, resized
from cml_dist.errors import DataError


def reads_pictures(description: dict[str, Any]) -> bool:
    """Whether the inputs of a described network are pictures."""
    return len(description["input_shape"]) == 3 and "mean" in description["preprocessing"]


def fitted_shape(description: dict[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width to which pictures are fitted as in packing; :func:`network_inputs` scales them."""
    channels, *size = description["input_shape"]
    return (channels, *description["preprocessing"].get("packed_size", size))


def network_inputs(description: dict[str, Any], images: Any, device: torch.device) -> Tensor:
    """Examples as the described network reads them: ``[N, *input_shape]`` float32, normalised as in training.

    Raises:
        DataError: naming the one that cannot be read.
    """
    shape = tuple(description["input_shape"])
    if not reads_pictures(description):
        return torch.as_tensor(np.asarray(images), dtype=torch.float32, device=device).reshape(-1, *shape)
    if isinstance(images, (str, Path)):
        raise DataError(f"images is one path ({images})", "give a sequence of images, e.g. [path]")
    fitted, how = fitted_shape(description), description["preprocessing"].get("interpolation", "bicubic")
    read = (_pixels(image, f"image {number}", fitted) for number, image in enumerate(images))
    read = [resized(pixels, shape[1:], how) for pixels in read]
    pixels = np.stack(read) if read else np.zeros((0, *shape))
    tensor = torch.from_numpy(pixels).to(device, torch.float32) / 255
    mean, std = (torch.tensor(description["preprocessing"][k], device=device) for k in ("mean", "std"))
    return (tensor - mean[:, None, None]) / std[:, None, None]


def _pixels(image: Any, what: str, shape: tuple[int, ...]) -> np.ndarray:
    """One image as uint8 ``[C, H, W]`` in this shape, read as packing reads it."""
    channels, *image_size = shape
    if isinstance(image, (str, Path)):
        what, image = str(image), file_bytes(image)
    elif not isinstance(image, (bytes, Image.Image)):
        try:
            array = np.asarray(image)
        except (TypeError, ValueError) as error:
            raise DataError(f"{what} cannot be read: {error}", "give paths, PIL images or uint8 arrays") from error
        if array.dtype != np.uint8:
            raise DataError(f"{what} has dtype {array.dtype}", "give uint8 pixels, 0 to 255")
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.transpose(1, 2, 0)
        try:
            image = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
        except (TypeError, ValueError) as error:
            raise DataError(f"{what} has shape {array.shape}", "give [H, W], [H, W, C] or [C, H, W]") from error
    return read_pixels(image, what, channels, tuple(image_size))
