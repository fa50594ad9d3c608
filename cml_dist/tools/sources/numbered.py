"""FGVC-Aircraft and VGG-Flower as published: one folder of numbered pictures, and files that say the class of each."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch

from cml_dist.errors import DataError
from cml_dist.tools.sources.matlab import read_variable
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
                what = f"{files}, packed or unpacked"
                found = one_picture(tree, tree.find(picture), picture, path, what)
                classes.setdefault(class_name, {})[found] = None
        return Found({name: list(paths) for name, paths in classes.items()}, None, tree)

    return Layout({name: lists}, read)


def one_picture(tree: SourceTree, found: Sequence[str], picture: str, path: str, needed: str) -> str:
    """The one path that was found for a picture of the list ``path``.

    Raises:
        DataError: if it is none, or several.
    """
    if len(found) != 1:
        what = f"{picture} of {path} is {'found several times in' if found else 'absent from'} {tree.where}"
        raise DataError(what, f"give a folder with {needed}")
    return found[0]


def _aircraft(tree: SourceTree, path: str) -> Iterator[tuple[str, str]]:
    for number, _, variant in (line.partition(" ") for line in tree.lines(path)):
        yield f"images/{number}.jpg", variant.strip()


def _flowers(tree: SourceTree, path: str) -> Iterator[tuple[str, str]]:
    with tree.reading(path):
        labels = read_variable(tree, path, "labels").astype(int)
    yield from ((f"jpg/image_{number:05d}.jpg", str(label)) for number, label in enumerate(labels, start=1))


AIRCRAFT = _layout("images_variant_*.txt", _aircraft, "fgvc-aircraft-2013b.tar.gz")
VGG_FLOWER = _layout("imagelabels.mat", _flowers, "102flowers.tgz and imagelabels.mat")
