"""Class folders of any depth, below a folder for each split or with lists of classes; and Omniglot as published."""

from __future__ import annotations

import posixpath

from cml_dist.errors import DataError
from cml_dist.tools.sources.known_splits import recognised
from cml_dist.tools.sources.shape import Found, Layout
from cml_dist.tools.sources.splits import WORDS, read_lists, split_files, split_of
from cml_dist.tools.sources.tree import SourceTree

_OMNIGLOT = ("images_background", "images_evaluation")


def class_folders(tree: SourceTree) -> set[str]:
    """The folders with pictures, but for those that are called like a split."""
    folders = set(map(posixpath.dirname, tree.images))
    return {folder for folder in folders if folder and not split_of(posixpath.basename(folder))}


def _split_folders(tree: SourceTree) -> dict[str, dict[str, list[str]]] | None:
    """Images by split and class, of the least deep folders ``train``, ``val``, ``test``; None without such."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for path in tree.images:
        parts = path.split("/")[:-1]
        for place, part in enumerate(parts[:-1]):  # at least a class folder must follow
            if split := split_of(part):
                classes = found.setdefault("/".join(parts[:place]), {}).setdefault(split, {})
                classes.setdefault("/".join(parts[place + 1 :]), []).append(path)
    whole = [parent for parent, splits in found.items() if "train" in splits and len(splits) > 1]
    return found[min(whole, key=lambda parent: parent.count("/"))] if whole else None


def _read(tree: SourceTree, own_splits: bool) -> Found:
    """Classes are named by their path below the folder of their split, or else by their whole path."""
    found, lists = _split_folders(tree), None if own_splits else read_lists(tree, None)
    classes: dict[str, list[str]] = {}
    if found is None or lists is not None:
        for path in tree.images:
            classes.setdefault(posixpath.dirname(path), []).append(path)
        return Found(classes, lists, tree)
    for name, paths in [pair for part in found.values() for pair in part.items()]:
        classes.setdefault(name, []).extend(paths)
    return Found(classes, None if own_splits else {split: list(part) for split, part in found.items()}, tree)


FOLDERS = Layout(
    {
        "pictures in class folders": lambda tree, _: len(class_folders(tree)) > 1,
        f"folders {WORDS} above them, or class lists train.txt, val.txt, test.txt, names of a known set, or --splits": (
            lambda tree, own_splits: own_splits or _split_folders(tree) or split_files(tree, ".txt")
            or recognised(class_folders(tree))
        ),
    },
    _read,
)


def _read_omniglot(tree: SourceTree, own_splits: bool) -> Found:
    """Classes are ``Alphabet/characterNN`` of both parts."""
    classes: dict[str, list[str]] = {}
    for part in _OMNIGLOT:
        inside = [parts for path in tree.images if part in (parts := path.split("/"))[:-3]]
        if not inside:
            what = f"{tree.where} has no images below {part}"
            raise DataError(what, f"give a folder with both {' and '.join(_OMNIGLOT)}, as zips or unpacked")
        for parts in inside:
            classes.setdefault("/".join(parts[parts.index(part) + 1 : -1]), []).append("/".join(parts))
    return Found(classes, None, tree)


def _has_omniglot(tree: SourceTree, _: bool) -> bool:
    return any(part in path.split("/")[:-1] for path in tree.images for part in _OMNIGLOT)


OMNIGLOT = Layout({f"{' and '.join(_OMNIGLOT)}, as zips or folders": _has_omniglot}, _read_omniglot)
