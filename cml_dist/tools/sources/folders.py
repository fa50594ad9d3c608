"""A tree of class folders of any depth, with lists of classes or with a folder for each split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cml_dist.domains.base import SPLITS
from cml_dist.errors import DataError
from cml_dist.tools.sources import omniglot
from cml_dist.tools.sources.lists import SplitLists, Splits, find_list_folders, read_lists
from cml_dist.tools.sources.tree import Item, SourceTree, items_of


def fits(tree: SourceTree, splits: Splits) -> bool:
    if omniglot.fits(tree, splits) or not tree.images():
        return False
    return splits is not None or bool(find_list_folders(tree, ".txt")) or _split_folders(tree) is not None


def items(tree: SourceTree, splits: Splits) -> list[Item]:
    lists = read_lists(tree, splits)
    by_folder = _images_by_folder(tree.images())
    if lists is None:
        prefix = _split_folders(tree)
        if prefix is None:
            raise DataError(
                f"{tree.where} says nowhere which class belongs to which split",
                "add train.txt, val.txt, test.txt (one class folder a line), or folders train/, val/, test/",
            )
        return _items_of_split_folders(tree, prefix, by_folder)
    root = _images_root(tree, lists, by_folder)
    return [
        item
        for split in SPLITS
        for name in lists.get(split, ())
        for item in items_of(tree, split, name, _class_images(tree, by_folder, root, name, split))
    ]


def _images_by_folder(images: Iterable[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for path in images:
        folders.setdefault(path.rpartition("/")[0], []).append(path)
    return folders


def _images_root(tree: SourceTree, lists: SplitLists, by_folder: dict[str, list[str]]) -> str:
    """The folder below which most of the listed class paths exist.

    Raises:
        DataError: if none of them exists anywhere, or two folders have equally many.
    """
    listed = {name for names in lists.values() for name in names}
    found: Counter[str] = Counter()
    for folder in _with_parents(by_folder):
        parts = folder.split("/")
        for cut in range(len(parts)):
            if "/".join(parts[cut:]) in listed:
                found["/".join(parts[:cut])] += 1
    if not found:
        raise DataError(
            f"none of the {len(listed)} listed classes is a folder with images in {tree.where}, e.g. {min(listed)!r}",
            "list class folders relative to the folder of images, one a line",
        )
    best = [root for root, count in found.items() if count == max(found.values())]
    if len(best) > 1:
        named = ", ".join(sorted(root or "." for root in best))
        raise DataError(
            f"the listed classes are found below several folders: {named}", "keep one of them, or list longer paths"
        )
    return best[0]


def _with_parents(folders: Iterable[str]) -> set[str]:
    parents: set[str] = set()
    for folder in folders:
        parts = folder.split("/")
        parents.update("/".join(parts[:end]) for end in range(1, len(parts) + 1))
    return parents


def _class_images(tree: SourceTree, by_folder: dict[str, list[str]], root: str, name: str, split: str) -> list[str]:
    """Images directly in the class's folder; where there are none, those below it."""
    folder = f"{root}/{name}" if root else name
    paths = by_folder.get(folder)
    if paths is None:
        below = [path for other, found in by_folder.items() if other.startswith(folder + "/") for path in found]
        paths = below
    if not paths:
        raise DataError(
            f"class {name!r} is listed in {split!r}, but {folder} in {tree.where} is absent or has no images",
            "add its images, or take it off the list",
        )
    return paths


def _split_folders(tree: SourceTree) -> str | None:
    """The folder whose subfolders ``train``, ``val``, ``test`` hold class folders; None where there is none."""
    prefixes: dict[str, set[str]] = {}
    for path in tree.images():
        parts = path.split("/")
        for place, part in enumerate(parts[:-2]):  # at least a class folder and a file must follow
            if part in SPLITS:
                prefixes.setdefault("/".join(parts[:place]), set()).add(part)
    whole = [prefix for prefix, found in prefixes.items() if "train" in found and len(found) > 1]
    return min(whole, key=lambda prefix: len(prefix.split("/")), default=None)


def _items_of_split_folders(tree: SourceTree, prefix: str, by_folder: dict[str, list[str]]) -> list[Item]:
    start = f"{prefix}/" if prefix else ""
    items = []
    for split in SPLITS:
        begin = f"{start}{split}/"
        for folder, paths in by_folder.items():
            if folder.startswith(begin):
                items += items_of(tree, split, folder.removeprefix(begin), paths)
    return items
