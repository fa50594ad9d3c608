"""Sets kept as arrays: the pickled miniImageNet cache, and tiered-ImageNet's npz or pickles with their labels."""

from __future__ import annotations

import io
import math
import posixpath
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from cml_dist.data.pixels import as_png
from cml_dist.tools.sources import plain_pickle
from cml_dist.tools.sources.archives import Member, Spool
from cml_dist.tools.sources.shape import Found, Layout, Row, gathered
from cml_dist.tools.sources.splits import files_of_splits
from cml_dist.tools.sources.tree import SourceTree

_SUFFIXES = (".npz", ".pkl", ".pickle")
_IMAGES, _LABELS = ("image_data", "images", "data"), ("labels", "label_specific")
_NAMES = ("label_specific_str", "label_names")

Images = tuple[int, Callable[[int], Member]]
"""How many there are, and each by its number."""


def _read(tree: SourceTree, own_splits: bool) -> Found:
    return gathered(tree, _rows(tree, own_splits), own_splits)


def _rows(tree: SourceTree, own_splits: bool) -> Iterator[Row]:
    spool = Spool(tree.scratch, tree.where)
    for split, paths in files_of_splits(tree, _SUFFIXES, own_splits).items():
        content: dict[str, Any] = {}
        images: Images | None = None
        # Where the images are there twice, the array is taken, whose name comes before that of the pickled PNGs.
        for path in (path for path in paths if images is None or "label" in posixpath.basename(path)):
            with tree.reading(path), tree.open(path) as stream:
                found = _npz(tree, path, stream, spool) if path.lower().endswith(".npz") else plain_pickle.load(stream)
                found = found if isinstance(found, dict) else {"images": found}
                key = next((key for key in _IMAGES if key in found), None)
                images = _stored(found.pop(key), spool) if key else images
                content |= found
        with tree.reading(paths[0]):
            for number, name in _labelled(content, split, images[0] if images else 0):
                yield Row(split, name, f"{split}{number}.png", images[1](number))


def _labelled(content: dict[str, Any], split: str, count: int) -> Iterator[tuple[int, str]]:
    """The number of each image with the name of its class."""
    if "class_dict" in content:
        pairs = [(number, name) for name, numbers in content["class_dict"].items() for number in numbers]
    else:
        key = next((key for key in _LABELS if key in content), None)
        if key is None or len(content[key]) != count:
            found = f"{len(content[key])} labels" if key else f"neither class_dict nor labels, but {', '.join(content)}"
            raise ValueError(f"the files of {split} have {count} images and {found}")
        if min(content[key], default=0) < 0:
            raise ValueError(f"the files of {split} have the label {min(content[key])}, which names no class")
        names = next((content[key] for key in _NAMES if key in content), None)
        # Plain numbers may begin at 0 in each split.
        pairs = [(at, f"{split}{int(n)}" if names is None else names[int(n)]) for at, n in enumerate(content[key])]
    for number, name in pairs:
        if not 0 <= int(number) < count:
            raise ValueError(f"the files of {split} name image {number} of {count}")
        yield int(number), plain_pickle.text(name)


def _stored(found: Any, spool: Spool) -> Images:
    """Images of an array uint8 ``[N, H, W, C]``, ``[N, C, H, W]`` or ``[N, H, W]``, or a list of encoded ones."""
    if isinstance(found, list):
        places = []
        for one in found:
            data = one if isinstance(one, bytes) else np.ascontiguousarray(one, np.uint8).tobytes()
            places.append((spool.append(data), len(data)))
        return len(places), lambda number: Member(places[number][1], partial(spool.open, *places[number]))
    if isinstance(found, np.ndarray):
        found = spool.append(np.ascontiguousarray(found)), found.shape, found.dtype
    start, shape, dtype = found
    is_image = len(shape) == 3 or len(shape) == 4 and (shape[1] in (1, 3) or shape[3] in (1, 3))
    if dtype != np.uint8 or not is_image or min(shape) < 1:
        raise ValueError(f"images are an array {dtype} {list(shape)}, not uint8 [N, H, W, C]")
    size = math.prod(shape[1:])
    return shape[0], lambda number: Member(size, partial(_png, spool, start + number * size, shape[1:]))


def _png(spool: Spool, start: int, shape: tuple[int, ...]) -> io.BytesIO:
    with spool.open(start, math.prod(shape)) as stream:
        pixels = np.frombuffer(stream.read(), np.uint8).reshape(shape)
    if len(shape) == 2:
        pixels = pixels[None]
    elif shape[-1] in (1, 3):
        pixels = pixels.transpose(2, 0, 1)
    return io.BytesIO(as_png(pixels).data)


def _npz(tree: SourceTree, path: str, stream: Any, spool: Spool) -> dict[str, Any]:
    """The arrays of a file; of a large one its place in the spool, shape and dtype.

    Of what a header says no more is believed than the bytes that follow it.
    """
    arrays: dict[str, Any] = {}
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            tree.check_size(f"{path}/{info.filename}", info.file_size)
            with archive.open(info) as member:
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0
                }[np.lib.format.read_magic(member)]  # fmt: skip
                shape, by_columns, dtype = read_header(member)
                if dtype.kind not in "biu" or by_columns or min(shape, default=0) < 0:
                    continue  # what needs it says what it lacks
                if math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
                    raise ValueError(f"{info.filename} says {dtype} {shape}, but holds {info.file_size} bytes")
                if len(shape) > 2:
                    arrays[info.filename.removesuffix(".npy")] = spool.size, shape, dtype
                    spool.copy(member)
                else:
                    arrays[info.filename.removesuffix(".npy")] = np.frombuffer(member.read(), dtype).reshape(shape)
    return arrays


ARRAYS = Layout(
    {
        "mini-imagenet-cache-train.pkl and its like, or train_images.npz with train_labels.pkl and their like": (
            lambda tree, own_splits: files_of_splits(tree, _SUFFIXES, own_splits)
        )
    },
    _read,
)
