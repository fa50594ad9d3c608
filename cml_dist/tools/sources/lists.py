"""Which class belongs to which split: given by name or mapping, or read from lists."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cml_dist.domains.base import SPLITS
from cml_dist.errors import DataError
from cml_dist.tools.sources.tree import SourceTree

SplitLists = Mapping[str, Sequence[str]]
"""The class names of each split, in their order."""

Splits = str | os.PathLike[str] | SplitLists | None
"""What a user may say of the splits: a known name or a folder of lists, or the lists themselves."""


def find_list_folders(tree: SourceTree, suffix: str) -> list[str]:
    """The least deep folders of the source that hold ``train``, ``val`` or ``test`` lists with this suffix."""
    folders = {folder for path in tree.paths for folder in [_list_folder(path, suffix)] if folder is not None}
    depth = min((folder.count("/") for folder in folders), default=0)
    return sorted(folder for folder in folders if folder.count("/") == depth)


def read_lists(tree: SourceTree, splits: Splits) -> SplitLists | None:
    """The class lists that were given, or those found in the source; None where there are none.

    Args:
        tree: the source.
        splits: class names by split; or a folder with ``train.txt``, ``val.txt``, ``test.txt``, inside the source or
            on the disk; None: look for such a folder in the source, the least deep one counts.

    Raises:
        DataError: if the folder is not found, or several are equally near.
    """
    if isinstance(splits, Mapping):
        return _checked({split: list(names) for split, names in splits.items()}, "splits")
    if splits is not None:
        return _checked(_read_named(tree, os.fspath(splits)), f"the lists of {os.fspath(splits)}")
    folders = find_list_folders(tree, ".txt")
    if len(folders) > 1:
        named = ", ".join(folder or "." for folder in folders)
        raise DataError(f"{tree.where} has split lists in several folders: {named}", "say which with --splits FOLDER")
    if not folders:
        return None
    return _checked(_read_folder(tree, folders[0]), f"the lists in {folders[0] or tree.where}")


def _list_folder(path: str, suffix: str) -> str | None:
    folder, _, name = path.rpartition("/")
    return folder if name in {split + suffix for split in SPLITS} else None


def _read_named(tree: SourceTree, name: str) -> SplitLists:
    folders = {folder for path in tree.paths for folder in [_list_folder(path, ".txt")] if folder is not None}
    wanted = name.strip("/")
    inside = [f for f in folders if any(f == w or f.endswith("/" + w) for w in (wanted, f"{wanted}/splits"))]
    if len(inside) > 1:
        raise DataError(f"--splits {name} fits several folders: {', '.join(sorted(inside))}", "give the whole path")
    if inside:
        return _read_folder(tree, inside[0])
    folder = Path(name).expanduser()
    files = {split: folder / f"{split}.txt" for split in SPLITS}
    if not any(file.is_file() for file in files.values()):
        known = ", ".join(sorted(folders)) or "none"
        raise DataError(
            f"--splits {name} is no folder of train.txt, val.txt, test.txt, neither on disk nor in {tree.where}",
            f"check the name (lists in the source: {known})",
        )
    there = SourceTree(str(folder), {f.name: f.read_bytes for f in files.values() if f.is_file()})
    return _read_folder(there, "")


def _read_folder(tree: SourceTree, folder: str) -> SplitLists:
    prefix = f"{folder}/" if folder else ""
    known = set(tree.paths)
    return {
        split: [line.strip("/") for line in tree.lines(f"{prefix}{split}.txt")]
        for split in SPLITS
        if f"{prefix}{split}.txt" in known
    }


def _checked(lists: SplitLists, what: str) -> SplitLists:
    owner: dict[str, str] = {}
    for split, names in lists.items():
        if split not in SPLITS:
            raise DataError(f"{what} has a split {split!r}", f"use {', '.join(SPLITS)}")
        for name in names:
            if name in owner:
                twice = f"twice in {split!r}" if owner[name] == split else f"in {owner[name]!r} and in {split!r}"
                raise DataError(f"class {name!r} is listed {twice} ({what})", "list each class once")
            owner[name] = split
    if not owner:
        raise DataError(f"{what} names no class", "list one class a line in train.txt, val.txt, test.txt")
    return lists
