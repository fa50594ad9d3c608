"""Lists of images and labels: Ravi and Larochelle's CSV files and their kin, and the JSON of easy-few-shot-learning."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence

from cml_dist.errors import DataError
from cml_dist.tools.sources.shape import Found, Layout
from cml_dist.tools.sources.splits import one_folder, split_files, split_of
from cml_dist.tools.sources.tree import SourceTree, plain_name

_FILE = (
    "filename", "file_name", "image_name", "image", "file", "path", "filepath", "file_path", "image_path", "img",
    "img_path", "image_id", "id", "name",
)  # fmt: skip
_LABEL = ("label", "class_name", "class", "label_name", "category", "species", "target", "synset", "breed")
_SPLIT = ("split", "set", "subset", "partition", "fold")
_CSV = "train.csv, val.csv, test.csv, or one .csv with a column for the split"
_JSON = "train.json, val.json, test.json with class_names and class_roots"


def _rows(tree: SourceTree, path: str) -> list[list[str]]:
    lines = tree.lines(path)
    delimiter = max(",;\t", key=lines[0].count) if lines else ","
    try:
        rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        return [[cell.strip() for cell in row] for row in rows]
    except csv.Error as error:
        raise DataError(f"{path} in {tree.where} is no list ({error})", "write a line for each image") from error


def _column(header: Sequence[str], names: Sequence[str]) -> int | None:
    words = [cell.lower().replace(" ", "_") for cell in header]
    return next((words.index(name) for name in names if name in words), None)


def _columns(tree: SourceTree, path: str, rows: list[list[str]]) -> tuple[int, int, int | None, list[list[str]]]:
    """The columns of file, label and split, and the rows below the header, which may be missing."""
    header = rows[0] if rows else []
    file, label = _column(header, _FILE), _column(header, _LABEL)
    if file is not None and label is not None:
        return file, label, _column(header, _SPLIT), rows[1:]
    for begin, row in enumerate(rows[:2]):  # the first line that names an image says in which column
        places = [place for place, cell in enumerate(row) if tree.find(cell)]
        if places:
            file = max(places, key=lambda place, row=row: "." in row[place])
            label = label if begin else None
            if label is None and len(row) == 2:
                label = 1 - file
            if label is not None:
                return file, label, _column(header, _SPLIT), rows[begin:]
            break
    raise DataError(
        f"{path} in {tree.where} has the columns {', '.join(header) or '(none)'}, and no full columns filename,label",
        "name them so, or write these two alone",
    )


def _single(tree: SourceTree) -> str | None:
    """The one CSV file that a source has."""
    paths = [path for path in tree.files if path.lower().endswith((".csv", ".tsv"))]
    return paths[0] if len(paths) == 1 else None


def _has_csv(tree: SourceTree, own_splits: bool) -> bool:
    if split_files(tree, ".csv"):
        return True
    path = _single(tree)
    try:
        return path is not None and (_columns(tree, path, _rows(tree, path))[2] is not None or own_splits)
    except DataError:
        return False


def _read_csv(tree: SourceTree, own_splits: bool) -> Found:
    if not split_files(tree, ".csv") and (single := _single(tree)):
        tables = {None: [single]}
    else:
        kind = "train.csv, val.csv, test.csv"
        tables = one_folder(tree, ".csv", kind, "give the folder that holds them and the images")
    classes: dict[str, dict[str, None]] = {}
    splits: dict[str, dict[str, None]] = {}
    for split, path in [(split, path) for split, paths in tables.items() for path in paths]:
        file, label, part, rows = _columns(tree, path, _rows(tree, path))
        if not rows or any(len(row) <= max(file, label) or not (row[file] and row[label]) for row in rows):
            raise DataError(f"{path} in {tree.where} has no full columns filename,label", "fill them in each line")
        for row in rows:
            found = tree.find(row[file])
            if len(found) != 1:
                what = f"image {row[file]!r} of {path} is {'found several times in' if found else 'absent from'}"
                raise DataError(f"{what} {tree.where}", "put each image once beside the list, or write longer paths")
            name = plain_name(row[label])
            classes.setdefault(name, {})[found[0]] = None
            said = split or (split_of(row[part]) if part is not None and part < len(row) else None)
            if said is None and not own_splits:
                what = f"{path} in {tree.where} gives no split that is known for image {row[file]!r}"
                raise DataError(what, "write train, val or test, or draw them: --splits 64,16,20")
            splits.setdefault(said or "", {})[name] = None
    return Found(
        {name: list(paths) for name, paths in classes.items()},
        None if own_splits else {split: sorted(names) for split, names in splits.items()},
        tree,
    )


CSV = Layout({"pictures": lambda tree, _: tree.images, _CSV: _has_csv}, _read_csv)


def _read_json(tree: SourceTree, own_splits: bool) -> Found:
    files = one_folder(tree, ".json", _JSON, "give the folder that holds them and the images")
    classes: dict[str, list[str]] = {}
    splits: dict[str, list[str]] = {}
    for split, path in [(split, path) for split, paths in files.items() for path in paths]:
        with tree.reading(path), tree.open(path) as stream:
            content = json.load(stream)
        try:
            pairs = list(zip(content["class_names"], content["class_roots"], strict=True))
        except (KeyError, TypeError, ValueError) as error:
            found = ", ".join(map(str, content))[:200] if isinstance(content, dict) else type(content).__name__
            what = f"{path} in {tree.where} has no class_names and class_roots of one length (found: {found})"
            raise DataError(what, "write both, a folder for each class") from error
        for name, root in pairs:
            folders = tree.find_folder(str(root))
            if len(folders) != 1:
                what = f"folder {root!r} of {path} is {'found several times in' if folders else 'absent from'}"
                raise DataError(f"{what} {tree.where}", "add its images, or write longer paths")
            name = plain_name(str(name))
            classes[name] = [one for one in tree.images if one.startswith(f"{folders[0]}/")]
            splits.setdefault(split, []).append(name)
    return Found(classes, None if own_splits else splits, tree)


def _has_json(tree: SourceTree, _: bool) -> bool:
    """Other tools write a train.json too."""
    for path in [path for files in split_files(tree, ".json").values() for paths in files.values() for path in paths]:
        with tree.open(path) as stream:
            if b'"class_names"' in stream.read(2**16):
                return True
    return False


JSON = Layout({"pictures": lambda tree, _: tree.images, _JSON: _has_json}, _read_json)
