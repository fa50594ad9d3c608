"""The layout of Ravi & Larochelle: ``images/`` beside ``train.csv``, ``val.csv``, ``test.csv``."""

from __future__ import annotations

import csv
import io
from pathlib import PurePosixPath

from cml_dist.domains.base import SPLITS
from cml_dist.errors import DataError
from cml_dist.tools.sources.lists import Splits, find_list_folders
from cml_dist.tools.sources.tree import Item, SourceTree, items_of


def fits(tree: SourceTree, splits: Splits) -> bool:
    return splits is None and bool(find_list_folders(tree, ".csv")) and bool(tree.images())


def items(tree: SourceTree, splits: Splits) -> list[Item]:
    if splits is not None:
        raise DataError("layout ravi has its splits in its csv files", "leave --splits out, or use --layout folders")
    folders = find_list_folders(tree, ".csv")
    if len(folders) != 1:
        found = ", ".join(folder or "." for folder in folders) or "none"
        raise DataError(
            f"layout ravi needs one folder with train.csv, val.csv, test.csv in {tree.where} (found: {found})",
            "check the source",
        )
    prefix = f"{folders[0]}/" if folders[0] else ""
    by_name: dict[str, list[str]] = {}
    for path in tree.images():
        by_name.setdefault(PurePosixPath(path).name, []).append(path)
    known = set(tree.paths)
    found_items: list[Item] = []
    for split in SPLITS:
        file = f"{prefix}{split}.csv"
        if file not in known:
            continue
        classes: dict[str, list[str]] = {}
        for name, label in _csv_rows(tree, file):
            classes.setdefault(label, []).append(_image_path(tree, prefix, name, by_name, known, file))
        found_items += [item for label in sorted(classes) for item in items_of(tree, split, label, classes[label])]
    return found_items


def _csv_rows(tree: SourceTree, file: str) -> list[tuple[str, str]]:
    rows = list(csv.DictReader(io.StringIO("\n".join(tree.lines(file)))))
    if not rows:
        raise DataError(f"{file} in {tree.where} has no rows", "it needs the columns filename,label")
    if not {"filename", "label"} <= set(rows[0]) or any(not row["filename"] or not row["label"] for row in rows):
        raise DataError(f"{file} in {tree.where} has no full columns filename,label", "add them")
    return [(row["filename"], row["label"]) for row in rows]


def _image_path(
    tree: SourceTree, prefix: str, name: str, by_name: dict[str, list[str]], known: set[str], file: str
) -> str:
    for path in (f"{prefix}images/{name}", f"{prefix}{name}"):
        if path in known:
            return path
    found = by_name.get(PurePosixPath(name).name, [])
    if len(found) != 1:
        raise DataError(
            f"image {name!r} of {file} is {'absent from' if not found else 'found several times in'} {tree.where}",
            "put the images into images/ beside the csv files",
        )
    return found[0]
