"""The layouts in which image sets are kept: which one a source has, and the images of each class and split."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cml_dist.data.base import SPLITS
from cml_dist.errors import DataError
from cml_dist.tools.sources import cifar100
from cml_dist.tools.sources.known_splits import CIFAR100_SPLITS, omniglot_split
from cml_dist.tools.sources.tree import SourceTree, join, open_source

SplitLists = Mapping[str, Sequence[str]]
"""The class names of each split, in their order."""

Splits = str | os.PathLike[str] | SplitLists | None
"""What a user may say of the splits: a known name or a folder of lists, or the lists themselves."""

_LISTS = tuple(f"{split}.txt" for split in SPLITS)
_CSVS = tuple(f"{split}.csv" for split in SPLITS)
_OMNIGLOT = ("images_background", "images_evaluation")


class Item(NamedTuple):
    """An image to pack: where it goes, and how to get its bytes."""

    split: str
    class_name: str
    key: str
    path: str
    read: Callable[[], bytes]

    @property
    def what(self) -> str:
        """Its name in errors."""
        return f"image {self.path} of class {self.class_name!r}"


Found = tuple[SourceTree, SplitLists, Mapping[str, Sequence[str]]]
"""A source as its layout reads it: the files, the classes of each split, the paths of each class's images."""


def recognise(tree: SourceTree, splits: Splits) -> str:
    """The name of the layout that the source has.

    Raises:
        DataError: if none or several fit.
    """
    if cifar100.find_folder(tree) is not None:
        return "cifar100"
    if any(part in path.split("/")[:-1] for path in tree.paths for part in _OMNIGLOT):
        return "omniglot"
    lists = splits is not None or tree.folders_of(*_LISTS) or _split_folders(tree) is not None
    tables = splits is None and tree.folders_of(*_CSVS)
    fitting = [name for name, fits in (("folders", lists), ("ravi", tables)) if fits and tree.images]
    if len(fitting) > 1:
        raise DataError(f"{tree.where} fits several layouts: {', '.join(fitting)}", "say which with --layout NAME")
    if not fitting:
        raise DataError(
            f"{tree.where} has no layout that is known. Looked for: folders: class folders of images with train.txt, "
            "val.txt, test.txt that list them, or below train/, val/, test/; ravi: train.csv, val.csv, test.csv with "
            "filename,label beside images/; cifar100: cifar-100-python with train, test, meta, or its tar.gz; "
            f"omniglot: {' and '.join(_OMNIGLOT)}, as zips or folders",
            "arrange it like one of these, or give --layout and --splits",
        )
    return fitting[0]


def find_items(tree: SourceTree, layout: str, splits: Splits) -> list[Item]:
    """The images to pack, ordered by split and class; ``layout`` is one of ``LAYOUTS``.

    Raises:
        DataError: if the source has another layout, or contradicts itself: a class without images or in two splits,
            an image in two classes.
    """
    tree, lists, classes = LAYOUTS[layout](tree, splits)
    split_of: dict[str, str] = {}
    items: dict[str, Item] = {}  # by path
    for split, name in [(one, name) for one in SPLITS for name in lists.get(one, ())]:
        if (first := split_of.setdefault(name, split)) != split:
            what = f"class {name!r} lies in the splits {first!r} and {split!r}"
            raise DataError(what, "give each class to one split")
        if not classes.get(name):
            what = f"class {name!r} is listed in {split!r}, but is absent from {tree.where} or has no images"
            raise DataError(what, "add its images, or take it off the list")
        for path in classes[name]:
            if path in items:
                what = f"image {path} is used twice: for class {items[path].class_name!r} and for class {name!r}"
                raise DataError(what, "list each class and each image once")
            items[path] = Item(split, name, f"{name}/{PurePosixPath(path).stem}", path, partial(tree.read, path))
    if not items:
        raise DataError(f"{tree.where} has no class to pack", "list one class a line in train.txt, val.txt, test.txt")
    return list(items.values())


# --------------------------------------------------------------------------- class folders


def _read_lists(tree: SourceTree, splits: Splits) -> SplitLists | None:
    """The class lists that were given, or those of the least deep folder of lists in the source; None without any."""
    if isinstance(splits, Mapping):
        for split in splits:
            if split not in SPLITS:
                raise DataError(f"splits has a split {split!r}", f"use {', '.join(SPLITS)}")
        return splits
    found = tree.folders_of(*_LISTS)
    if splits is None:
        chosen = _least_deep(found)
        if not chosen:
            return None
    else:
        wanted = os.fspath(splits).strip("/")
        chosen = [folder for folder in found if f"/{folder}".endswith((f"/{wanted}", f"/{wanted}/splits"))]
        if not chosen:
            folder = Path(splits).expanduser()
            if not any((folder / name).is_file() for name in _LISTS):
                raise DataError(
                    f"--splits {splits} is no folder of {', '.join(_LISTS)}, neither on disk nor in {tree.where}",
                    f"check the name (lists in the source: {', '.join(found) or 'none'})",
                )
            tree, chosen = open_source(folder), [""]
    if len(chosen) > 1:
        where = ", ".join(folder or "." for folder in chosen)
        raise DataError(f"{tree.where} has split lists in several folders: {where}", "say which with --splits FOLDER")
    files = {split: join(chosen[0], f"{split}.txt") for split in SPLITS}
    return {s: [line.strip("/") for line in tree.lines(path)] for s, path in files.items() if path in tree.paths}


def _least_deep(folders: list[str]) -> list[str]:
    depth = min((folder.count("/") for folder in folders), default=0)
    return [folder for folder in folders if folder.count("/") == depth]


def _folders(tree: SourceTree, splits: Splits) -> Found:
    """Class folders of any depth, with lists of classes or with a folder for each split."""
    lists = _read_lists(tree, splits)
    if lists is not None:
        return tree, lists, _listed_classes(tree, lists)
    found = _split_folders(tree)
    if found is None:
        raise DataError(
            f"{tree.where} says nowhere which class belongs to which split",
            "add train.txt, val.txt, test.txt (one class folder a line), or folders train/, val/, test/",
        )
    lists = {split: list(classes) for split, classes in found.items()}
    return tree, lists, {name: paths for classes in found.values() for name, paths in classes.items()}


def _listed_classes(tree: SourceTree, lists: SplitLists) -> dict[str, list[str]]:
    """Images of each listed class: those in the one folder whose path ends like its name, or else below that folder."""
    by_folder: dict[str, list[str]] = {}
    by_end: dict[str, set[str]] = {}  # folders that hold images at any depth, by their own name
    for path in tree.images:
        folder = path.rpartition("/")[0]
        if folder not in by_folder:
            parts = folder.split("/")
            for number, part in enumerate(parts, start=1):
                by_end.setdefault(part, set()).add("/".join(parts[:number]))
        by_folder.setdefault(folder, []).append(path)
    classes = {}
    for name in {name for names in lists.values() for name in names}:
        ends = by_end.get(name.rpartition("/")[2], ())
        folders = sorted(folder for folder in ends if f"/{folder}".endswith(f"/{name}"))
        if len(folders) > 1:
            what = f"class {name!r} is found in several folders: {', '.join(folders)}"
            raise DataError(what, "keep one of them, or list longer paths")
        for folder in folders:
            below = (paths for other, paths in by_folder.items() if other.startswith(f"{folder}/"))
            classes[name] = by_folder.get(folder) or [path for paths in below for path in paths]
    return classes


def _split_folders(tree: SourceTree) -> dict[str, dict[str, list[str]]] | None:
    """Images by split and class, of the least deep folders ``train``, ``val``, ``test``; None without such."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for path in tree.images:
        parts = path.split("/")[:-1]
        for place, part in enumerate(parts[:-1]):  # at least a class folder must follow
            if part in SPLITS:
                classes = found.setdefault("/".join(parts[:place]), {}).setdefault(part, {})
                classes.setdefault("/".join(parts[place + 1 :]), []).append(path)
    whole = [parent for parent, splits in found.items() if "train" in splits and len(splits) > 1]
    return found[min(whole, key=lambda parent: parent.count("/"))] if whole else None


# --------------------------------------------------------------------------- sets as published


def _ravi(tree: SourceTree, splits: Splits) -> Found:
    """Ravi & Larochelle: ``images/`` beside ``train.csv``, ``val.csv``, ``test.csv``."""
    if splits is not None:
        raise DataError("layout ravi has its splits in its csv files", "leave --splits out, or use --layout folders")
    folders = _least_deep(tree.folders_of(*_CSVS))
    if len(folders) != 1:
        found = ", ".join(folder or "." for folder in folders) or "none"
        what = f"layout ravi needs one folder with train.csv, val.csv, test.csv in {tree.where} (found: {found})"
        raise DataError(what, "check the source")
    by_name: dict[str, list[str]] = {}
    for path in tree.images:
        by_name.setdefault(PurePosixPath(path).name, []).append(path)
    lists: dict[str, list[str]] = {}
    classes: dict[str, list[str]] = {}
    for split in SPLITS:
        file = join(folders[0], f"{split}.csv")
        if file not in tree.paths:
            continue
        rows = [(row.get("filename"), row.get("label")) for row in csv.DictReader(tree.lines(file))]
        if not rows or not all(name and label for name, label in rows):
            raise DataError(f"{file} in {tree.where} has no full columns filename,label", "add them")
        lists[split] = sorted({label for _, label in rows})
        for name, label in rows:
            found = by_name.get(PurePosixPath(name).name, [])
            if len(found) != 1:
                how = "found several times in" if found else "absent from"
                what = f"image {name!r} of {file} is {how} {tree.where}"
                raise DataError(what, "put each image once into images/ beside the csv files")
            classes.setdefault(label, []).append(found[0])
    return tree, lists, classes


def _cifar100(tree: SourceTree, splits: Splits) -> Found:
    """The original pickles, split as published or by lists of the user's own."""
    lists = CIFAR100_SPLITS.get(splits) if isinstance(splits, str) else None
    if lists is None and splits is not None:
        lists = _read_lists(tree, splits)
    if lists is None:
        raise DataError(
            f"{tree.where} is CIFAR-100, for which there are several splits",
            f"say which: --splits {' or --splits '.join(CIFAR100_SPLITS)}, or a folder of lists",
        )
    images, classes = cifar100.read(tree)
    return images, lists, classes


def _omniglot(tree: SourceTree, splits: Splits) -> Found:
    """Omniglot as published: classes are ``Alphabet/characterNN`` of both parts; without lists split as Vinyals did."""
    classes: dict[str, list[str]] = {}
    for part in _OMNIGLOT:
        inside = [parts for path in tree.images if part in (parts := path.split("/"))[:-3]]
        if not inside:
            raise DataError(
                f"{tree.where} has no images below {part}",
                f"give a folder with both {' and '.join(_OMNIGLOT)}, as zips or unpacked",
            )
        for parts in inside:
            classes.setdefault("/".join(parts[parts.index(part) + 1 : -1]), []).append("/".join(parts))
    lists = _read_lists(tree, splits) if splits is not None else None
    if lists is None:
        lists = {split: [name for name in sorted(classes) if omniglot_split(name) == split] for split in SPLITS}
    return tree, lists, classes


LAYOUTS = {"folders": _folders, "ravi": _ravi, "cifar100": _cifar100, "omniglot": _omniglot}
