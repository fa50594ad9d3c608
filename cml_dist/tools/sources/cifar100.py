"""The original CIFAR-100 pickles, read without letting them run code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from cml_dist.domains.base import SPLITS
from cml_dist.domains.pixels import encode_png
from cml_dist.errors import DataError
from cml_dist.tools.sources.known_splits import CIFAR100_SPLITS
from cml_dist.tools.sources.lists import SplitLists, Splits, read_lists
from cml_dist.tools.sources.tree import Item, SourceTree

_FILES = ("train", "test", "meta")
_SIDE = 32

ClassImages = dict[str, list[tuple[str, Callable[[], bytes]]]]
"""For each class its images: key, and a function that gives the PNG."""


def fits(tree: SourceTree, splits: Splits) -> bool:
    return find_folder(tree) is not None


def items(tree: SourceTree, splits: Splits) -> list[Item]:
    lists = class_lists(tree, splits)
    images = read(tree)
    found: list[Item] = []
    for split in SPLITS:
        for name in lists.get(split, ()):
            if name not in images:
                raise DataError(f"class {name!r} is listed in {split!r}, but CIFAR-100 has no such class", "correct it")
            found += [Item(split, name, f"{name}/{key}", f"{name}/{key}", read) for key, read in images[name]]
    return found


def find_folder(tree: SourceTree) -> str | None:
    """The folder that holds the three files, e.g. ``cifar-100-python``; None where there is none."""
    known = set(tree.paths)
    for path in tree.paths:
        folder, _, name = path.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        if name == "meta" and all(prefix + file in known for file in _FILES):
            return folder
    return None


def class_lists(tree: SourceTree, splits: Splits) -> SplitLists:
    """The lists of a published split by name, or lists of the user's own.

    Raises:
        DataError: if none is named: CIFAR-100 itself says nothing of few-shot splits.
    """
    if isinstance(splits, str) and splits in CIFAR100_SPLITS:
        return CIFAR100_SPLITS[splits]
    lists = read_lists(tree, splits) if splits is not None else None
    if lists is None:
        raise DataError(
            f"{tree.where} is CIFAR-100, for which there are several splits",
            f"say which: --splits {' or --splits '.join(CIFAR100_SPLITS)}, or a folder of lists",
        )
    return lists


def read(tree: SourceTree) -> ClassImages:
    """All 60,000 images by fine label, those of ``train`` before those of ``test``.

    Raises:
        DataError: if a file is damaged, or holds anything but plain data.
    """
    folder = find_folder(tree)
    if folder is None:
        raise DataError(f"{tree.where} has no folder with train, test and meta", "give cifar-100-python or its tar.gz")
    prefix = f"{folder}/" if folder else ""
    names = [_text(name) for name in _field(_load(tree, f"{prefix}meta"), b"fine_label_names", f"{prefix}meta")]
    images: ClassImages = {name: [] for name in names}
    for part in ("train", "test"):
        path = prefix + part
        content = _load(tree, path)
        labels, pixels = _field(content, b"fine_labels", path), _field(content, b"data", path)
        files = content.get(b"filenames") or [f"{part}-{number:05d}.png" for number in range(len(labels))]
        _check(path, labels, pixels, files, len(names))
        for label, row, file in zip(labels, pixels, files, strict=True):
            images[names[label]].append((_text(file).rpartition(".")[0] or _text(file), _png(row)))
    return images


class _PlainData(pickle.Unpickler):
    """Unpickles numpy arrays, lists, dictionaries, bytes and numbers; refuses everything else."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        if name == "_reconstruct":
            # The place that numpy's own pickles name; it moved in numpy 2.
            return np.empty(0).__reduce__()[0]
        return super().find_class(module, name)


def _load(tree: SourceTree, path: str) -> Mapping[bytes, Any]:
    try:
        content = _PlainData(io.BytesIO(tree.read(path)), encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"{path} in {tree.where} is no plain pickle of CIFAR-100 ({error})", "download it again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} in {tree.where} holds no dictionary", "download it again")
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


def _field(content: Mapping[bytes, Any], name: bytes, path: str) -> Any:
    if name not in content:
        raise DataError(f"{path} has no {name.decode()}: it is not of CIFAR-100", "give the original python version")
    return content[name]


def _check(path: str, labels: Any, pixels: Any, files: Any, num_classes: int) -> None:
    good = (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.shape == (len(labels), 3 * _SIDE * _SIDE)
        and len(files) == len(labels)
        and all(isinstance(label, int) and 0 <= label < num_classes for label in labels)
    )
    if not good:
        raise DataError(f"{path} does not hold 32x32 colour images with a label each", "download it again")


def _png(row: np.ndarray) -> Callable[[], bytes]:
    return lambda: encode_png(Image.fromarray(row.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0).copy()))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
