"""The original CIFAR-100 pickles, read without letting them run code (torchvision's reader does, and checks md5)."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from cml_dist.data.pixels import as_png
from cml_dist.errors import DataError
from cml_dist.tools.sources.tree import SourceTree, join


def find_folder(tree: SourceTree) -> str | None:
    """The folder that holds the three files, e.g. ``cifar-100-python``; None where there is none."""
    folders = (tree.folders_of(name) for name in ("train", "test", "meta"))
    return min(set.intersection(*map(set, folders)), default=None)


def read(tree: SourceTree) -> tuple[SourceTree, dict[str, list[str]]]:
    """All 60,000 images as files ``class/name.png`` of a tree, and those of each class, ``train`` before ``test``.

    Raises:
        DataError: if a file is damaged, or holds anything but plain data.
    """
    folder = find_folder(tree)
    if folder is None:
        raise DataError(f"{tree.where} has no folder with train, test and meta", "give cifar-100-python or its tar.gz")
    readers: dict[str, Callable[[], bytes]] = {}
    classes: dict[str, list[str]] = {}
    names: list[str] = []
    for part in ("meta", "train", "test"):
        data = tree.read(join(folder, part))
        try:
            content = _PlainData(io.BytesIO(data), encoding="bytes").load()
            if part == "meta":
                names = [name.decode() for name in content[b"fine_label_names"]]
                classes = {name: [] for name in names}
                continue
            labels, pixels = content[b"fine_labels"], content[b"data"].reshape(-1, 3, 32, 32)
            for label, picture, file in zip(labels, pixels, content[b"filenames"], strict=True):
                path = f"{names[label]}/{file.decode()}"
                classes[names[label]].append(path)
                readers[path] = lambda picture=picture: as_png(picture).data
        except Exception as error:  # a damaged pickle raises almost anything
            what = f"{join(folder, part)} in {tree.where} is no plain pickle of CIFAR-100"
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{what} ({reason})", "download the original python version again") from error
    return SourceTree(tree.where, readers), classes


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
