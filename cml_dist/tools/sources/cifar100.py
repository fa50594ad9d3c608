"""The original CIFAR-100 pickles."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial

import numpy as np

from cml_dist.data.pixels import as_png
from cml_dist.errors import DataError
from cml_dist.tools.sources import plain_pickle
from cml_dist.tools.sources.archives import Member
from cml_dist.tools.sources.shape import Found, Layout, Row, gathered
from cml_dist.tools.sources.tree import SourceTree

_PARTS = ("meta", "train", "test")


def _folder(tree: SourceTree) -> str | None:
    """The folder that holds the three files, e.g. ``cifar-100-python/``; None where there is none."""
    folders = (path.removesuffix("meta") for path in tree.files if f"/{path}".endswith("/meta"))
    return next((folder for folder in folders if all(folder + part in tree.files for part in _PARTS)), None)


def _read(tree: SourceTree, own_splits: bool) -> Found:
    folder = _folder(tree)
    if folder is None:
        raise DataError(f"{tree.where} has no folder with train, test and meta", "give cifar-100-python or its tar.gz")
    return gathered(tree, _rows(tree, folder), True)


def _rows(tree: SourceTree, folder: str) -> Iterator[Row]:
    names: list[str] = []
    for part in _PARTS:
        try:
            with tree.open(folder + part) as stream:
                content = plain_pickle.load(stream)
            if part == "meta":
                names = [name.decode() for name in content["fine_label_names"]]
                continue
            labels, pixels = content["fine_labels"], content["data"].reshape(-1, 3, 32, 32)
            for label, picture, file in zip(labels, pixels, content["filenames"], strict=True):
                yield Row("", names[label], file.decode(), Member(picture.nbytes, partial(_png, picture)))
        except DataError:
            raise
        except Exception as error:  # a damaged pickle raises almost anything
            what = f"{folder}{part} in {tree.where} is no plain pickle of CIFAR-100"
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{what} ({reason})", "download the original python version again") from error


def _png(pixels: np.ndarray) -> io.BytesIO:
    return io.BytesIO(as_png(pixels).data)


CIFAR100 = Layout({"cifar-100-python with train, test, meta": lambda tree, _: _folder(tree) is not None}, _read)
