"""FGVC-Aircraft and VGG-Flower as published: one folder of numbered pictures, and files that say the class of each."""

from __future__ import annotations

import posixpath
import struct
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch

import numpy as np

from cml_dist.errors import DataError
from cml_dist.tools.sources.shape import Found, Layout
from cml_dist.tools.sources.tree import SourceTree


def _layout(name: str, pairs: Callable[[SourceTree, str], Iterator[tuple[str, str]]], files: str) -> Layout:
    """A layout with lists of this name, from each of which come pairs of a picture and its class."""

    def lists(tree: SourceTree, _: bool) -> list[str]:
        return [path for path in tree.files if fnmatch(posixpath.basename(path), name)]

    def read(tree: SourceTree, _: bool) -> Found:
        classes: dict[str, dict[str, None]] = {}
        for path in lists(tree, _):
            for picture, class_name in pairs(tree, path):
                found = tree.find(picture)
                if len(found) != 1:
                    what = f"{picture} of {path} is {'found several times in' if found else 'absent from'} {tree.where}"
                    raise DataError(what, f"give a folder with {files}, packed or unpacked")
                classes.setdefault(class_name, {})[found[0]] = None
        return Found({name: list(paths) for name, paths in classes.items()}, None, tree)

    return Layout({name: lists}, read)


def _aircraft(tree: SourceTree, path: str) -> Iterator[tuple[str, str]]:
    for number, _, variant in (line.partition(" ") for line in tree.lines(path)):
        yield f"images/{number}.jpg", variant.strip()


def _flowers(tree: SourceTree, path: str) -> Iterator[tuple[str, str]]:
    """By the matrix ``labels``, of which a MATLAB 5 file has the parts at these places (MathWorks, MAT-File Format)."""
    with tree.open(path) as stream, tree.reading(path):
        data = stream.read(2**20)[128:]
        data = data if data[0] == 14 else zlib.decompressobj().decompress(data[8:], 2**20)
        if data[48:54] != b"labels":
            raise ValueError("it has no matrix labels")
        kind, size = struct.unpack_from("<II", data, 56)
        labels = np.frombuffer(data[64 : 64 + size], {2: "u1", 4: "<u2", 9: "<f8"}[kind]).astype(int)
    yield from ((f"jpg/image_{number:05d}.jpg", str(label)) for number, label in enumerate(labels, start=1))


AIRCRAFT = _layout("images_variant_*.txt", _aircraft, "fgvc-aircraft-2013b.tar.gz")
VGG_FLOWER = _layout("imagelabels.mat", _flowers, "102flowers.tgz and imagelabels.mat")
