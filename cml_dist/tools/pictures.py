"""Pictures that a command names: in class folders, in any folder or archive, single ones, or by a pattern."""

from __future__ import annotations

import glob
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cml_dist.data.pixels import file_bytes
from cml_dist.errors import DataError
from cml_dist.tools.sources.tree import ARCHIVE, SYSTEM, SourceTree, natural_order, open_source


class PictureFile(NamedTuple):
    """A picture: how people call it, and its bytes, or DataError."""

    name: str
    read: Callable[[], bytes]


class Examples(NamedTuple):
    """Pictures with a label each, class by class in natural order; and names of files that are no pictures."""

    pictures: list[PictureFile]
    labels: list[str]
    left: list[str]


def find_examples(source: str) -> Examples:
    """The pictures in a folder (or archive) of class folders, at any depth below them.

    Raises:
        DataError: none are there, one lies in no class folder, or there is one class alone.
    """
    tree = open_source(source)
    remedy = "give a folder with a folder of pictures for each class"
    if not tree.images:
        raise DataError(f"--support {source} holds no pictures", remedy)
    folders = [posixpath.dirname(path) for path in tree.images]
    top = posixpath.commonpath(folders)  # of all classes, as in an archive of one folder
    top = posixpath.dirname(top) if top in folders else top
    labels = [path[len(top) :].lstrip("/").partition("/")[0] for path in tree.images]
    for path in tree.images:
        if "/" not in path:
            raise DataError(f"picture {path} of --support {source} lies in no class folder", remedy)
    classes = list(Counter(labels))
    if len(classes) < 2:
        raise DataError(f"--support {source} holds one class alone, {classes[0]}", remedy)
    return Examples(_named(source, tree), labels, _others(source, tree))


def find_pictures(places: Sequence[str], option: str = "--images") -> tuple[list[PictureFile], list[str]]:
    """All pictures of folders (at any depth), archives, single files and patterns; and names of other files there.

    A file that is named, or that a pattern means, is taken whatever it is. Errors name ``option``.

    Raises:
        DataError: one of ``places`` means nothing, or there are no pictures.
    """
    found: list[PictureFile] = []
    left: list[str] = []
    for place in places:
        met = [place] if Path(place).exists() else sorted(glob.glob(place, recursive=True), key=natural_order)
        if not met:
            raise DataError(f"{option} {place} is no file or folder, and no pattern of any", "check the path")
        for name in met:
            if Path(name).is_dir() or ARCHIVE.search(name):
                tree = open_source(name)
                found += _named(name, tree)
                left += _others(name, tree)
            else:
                found.append(PictureFile(name, partial(file_bytes, name)))
    if not found:
        raise DataError(
            f"{option} {' '.join(places)} holds no pictures", "give a folder, a picture or a pattern of them"
        )
    return list({picture.name: picture for picture in found}.values()), left


def _named(source: str, tree: SourceTree) -> list[PictureFile]:
    return [PictureFile(f"{source.rstrip('/')}/{path}", partial(tree.read, path)) for path in tree.images]


def _others(source: str, tree: SourceTree) -> list[str]:
    images = set(tree.images)
    left = [path for path, why in tree.left if why != SYSTEM] + [path for path in tree.files if path not in images]
    return [f"{source.rstrip('/')}/{path}" for path in left]
