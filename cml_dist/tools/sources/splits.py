"""Which split is meant: by the names of folders and files, by lists of classes, or drawn by shares."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cml_dist.data.base import SPLITS
from cml_dist.errors import DataError
from cml_dist.tools.sources.known_splits import known_sets
from cml_dist.tools.sources.shape import SplitLists
from cml_dist.tools.sources.tree import SourceTree, open_source, plain_name

Splits = str | os.PathLike[str] | SplitLists | None
"""What a user may say of the splits: a known name, shares as ``"64,16,20"``, a folder of lists, or the lists."""

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
WORDS = "train, val (or valid, validation, dev), test"


def split_of(word: str) -> str | None:
    """The split that the name of a folder or file means; None: none."""
    return _WORDS.get(word.lower())


def split_in(path: str) -> str | None:
    """The one split of which the name of a file speaks, as in ``train_images.npz``, or else that of its folder."""
    for part in reversed(path.split("/")):
        found = {_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _WORDS}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def files_of_splits(tree: SourceTree, suffixes: tuple[str, ...], own_splits: bool) -> dict[str, list[str]]:
    """Files with a suffix, by the split that ``split_in`` finds; those of none only where the user gives the splits."""
    found: dict[str, list[str]] = {}
    for path in tree.files:
        if path.lower().endswith(suffixes) and (split := split_in(path) or ("all" if own_splits else None)):
            found.setdefault(split, []).append(path)
    return found


def split_files(tree: SourceTree, suffix: str) -> dict[str, dict[str, list[str]]]:
    """Files such as ``train.txt`` with this suffix, by folder and split."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in tree.files:
        folder, name = posixpath.split(path)
        stem, ending = posixpath.splitext(name)
        if ending.lower() == suffix and (split := split_of(stem)):
            found.setdefault(folder, {}).setdefault(split, []).append(path)
    return found


def one_folder(tree: SourceTree, suffix: str, kind: str, remedy: str) -> dict[str, list[str]]:
    """The files of ``split_files`` in the least deep folder that has any.

    Raises:
        DataError: if there is none, or several are equally deep.
    """
    found = split_files(tree, suffix)
    depth = min((folder.count("/") for folder in found), default=0)
    chosen = [folder for folder in found if folder.count("/") == depth]
    if len(chosen) != 1:
        where = f"in several folders: {', '.join(folder or '.' for folder in chosen)}" if chosen else "nowhere"
        raise DataError(f"{tree.where} has {kind} {where}", remedy)
    return found[chosen[0]]


def read_lists(tree: SourceTree, splits: Splits) -> SplitLists | None:
    """The class lists that were given, or those of the least deep folder of lists in the source; None without any."""
    if isinstance(splits, Mapping):
        for split in splits:
            if split not in SPLITS:
                raise DataError(f"splits has a split {split!r}", f"use {', '.join(SPLITS)}")
        return {split: [plain_name(name) for name in names] for split, names in splits.items()}
    found = split_files(tree, ".txt")
    if splits is None:
        if not found:
            return None
        files = one_folder(tree, ".txt", "split lists", "say which with --splits FOLDER")
    else:
        wanted = plain_name(os.fspath(splits))
        chosen = [folder for folder in found if f"/{folder}".endswith((f"/{wanted}", f"/{wanted}/splits"))]
        if len(chosen) > 1:
            what = f"{tree.where} has split lists in several folders: {', '.join(chosen)}"
            raise DataError(what, "give a longer path")
        folder = Path(splits).expanduser()
        if chosen:
            files = found[chosen[0]]
        elif folder.is_dir() and (found := split_files(lists := open_source(folder), ".txt").get("")):
            tree, files = lists, found
        else:
            raise DataError(
                f"--splits {splits} is no folder of train.txt, val.txt, test.txt, neither on disk nor in {tree.where}",
                f"check the name (lists in the source: {', '.join(found) or 'none'}), or give shares, e.g. 64,16,20, "
                f"or one of {', '.join(known_sets())}",
            )
    return {split: [plain_name(line) for path in paths for line in tree.lines(path)] for split, paths in files.items()}


def shares_of(splits: Splits) -> list[float] | None:
    """The shares of train, val and test that a text such as ``64,16,20`` means; None: it means something else.

    Raises:
        DataError: if it has another number of shares than three, or they are all 0.
    """
    if not (isinstance(splits, str) and re.fullmatch(r"[\d.]+([,:/][\d.]+)+", splits)):
        return None
    try:
        shares = [float(share) for share in re.split("[,:/]", splits)]
    except ValueError:
        shares = []
    if len(shares) != len(SPLITS) or sum(shares) <= 0:
        raise DataError(f"--splits {splits} are no shares of {', '.join(SPLITS)}", "give three, e.g. --splits 64,16,20")
    return shares


def draw_splits(names: Sequence[str], shares: Sequence[float], seed: int, least: int = 0) -> SplitLists:
    """Whole classes drawn for each split; the same for the same names, shares and seed.

    Args:
        least: classes that each split gets whatever its share; there must be enough of them.

    Raises:
        DataError: if a share would get no class.
    """
    counts = np.diff(np.rint(np.cumsum(shares) / sum(shares) * len(names)).astype(int), prepend=0)
    while counts.min() < least:
        counts[counts.argmax()] -= 1
        counts[counts.argmin()] += 1
    order = np.random.default_rng(seed).permutation(len(names))
    parts = zip(SPLITS, np.split(order, np.cumsum(counts)[:-1]), strict=True)
    drawn = {split: [names[at] for at in sorted(part)] for split, part in parts}
    for split, share in zip(SPLITS, shares, strict=True):
        if share and not drawn[split]:
            given = ",".join(f"{one:g}" for one in shares)
            raise DataError(f"of {len(names)} classes, shares {given} leave none for {split}", "raise its share")
    return drawn
