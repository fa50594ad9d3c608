"""The layouts in which image sets are kept: which one a source has, and the pictures of each class and split."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence

from cml_dist.data.base import SPLITS
from cml_dist.errors import DataError
from cml_dist.tools.sources.arrays import ARRAYS
from cml_dist.tools.sources.cars import CARS
from cml_dist.tools.sources.cifar100 import CIFAR100
from cml_dist.tools.sources.folders import FOLDERS, OMNIGLOT, class_folders
from cml_dist.tools.sources.numbered import AIRCRAFT, VGG_FLOWER
from cml_dist.tools.sources.parquet import PARQUET
from cml_dist.tools.sources.shape import Layout, SplitLists
from cml_dist.tools.sources.tables import CSV, JSON
from cml_dist.tools.sources.tree import SourceTree

LAYOUTS: dict[str, Layout] = {
    "folders": FOLDERS, "csv": CSV, "json": JSON, "arrays": ARRAYS, "parquet": PARQUET, "cifar100": CIFAR100,
    "omniglot": OMNIGLOT, "cars": CARS, "aircraft": AIRCRAFT, "vgg_flower": VGG_FLOWER,
}  # fmt: skip
_UNMISTAKABLE = ("cifar100", "omniglot", "cars", "aircraft", "vgg_flower")  # though their folders also look like others


def recognise(tree: SourceTree, own_splits: bool) -> str:
    """The name of the layout that the source has; class folders are enough where it has no other.

    Raises:
        DataError: if none or several fit.
    """
    lacking = {
        name: [need for need, is_met in layout.needs.items() if not is_met(tree, own_splits)]
        for name, layout in LAYOUTS.items()
    }
    fitting = [name for name, needs in lacking.items() if not needs]
    fitting = [name for name in _UNMISTAKABLE if name in fitting][:1] or fitting
    if len(fitting) > 1:
        raise DataError(f"{tree.where} fits several layouts: {', '.join(fitting)}", "say which with --layout NAME")
    if fitting:
        return fitting[0]
    if len(class_folders(tree)) > 1:
        return "folders"  # the splits are drawn
    nearest = min(LAYOUTS, key=lambda name: len(lacking[name]) / len(LAYOUTS[name].needs))
    near = f"Nearest is {nearest}, which lacks {' and '.join(lacking[nearest])}. "
    looked_for = "; ".join(f"{name}: {', with '.join(layout.needs)}" for name, layout in LAYOUTS.items())
    raise DataError(
        f"{tree.where} has no layout that is known. Found: {_census(tree)}. "
        f"{near if len(lacking[nearest]) < len(LAYOUTS[nearest].needs) else ''}Looked for: {looked_for}",
        "arrange it like one of these: a folder of pictures for each class is enough",
    )


def _census(tree: SourceTree) -> str:
    """Counts of files by suffix and depth."""
    kinds = Counter((posixpath.splitext(path)[1].lower() or "no suffix", path.count("/")) for path in tree.files)
    counts = [f"{count:,} {suffix} {depth} folders deep" for (suffix, depth), count in kinds.most_common(8)]
    return ", ".join(counts) + (", and others" if len(kinds) > 8 else "") or "no files"


def choose(
    where: str, classes: Mapping[str, Sequence[str]], splits: SplitLists
) -> dict[str, tuple[str, Sequence[str]]]:
    """The split and the pictures of each class that is listed, ordered by split.

    A listed name means the class of this name or path, or whose path ends like it; or else all below that folder.

    Raises:
        DataError: for what contradicts itself: a class without pictures or in two splits, a picture in two classes.
    """
    by_end: dict[str, list[str]] = {}
    for name in dict.fromkeys(folder for path in classes for folder in (path, *_above(path))):
        by_end.setdefault(posixpath.basename(name), []).append(name)
    chosen: dict[str, tuple[str, Sequence[str]]] = {}
    user: dict[str, str] = {}  # of each picture: its class
    for split, name in [(one, name) for one in SPLITS for name in splits.get(one, ())]:
        if chosen.get(name, (split,))[0] != split:
            what = f"class {name!r} lies in the splits {chosen[name][0]!r} and {split!r}"
            raise DataError(what, "give each class to one split, or draw them: --splits 64,16,20")
        ends = [path for path in by_end.get(posixpath.basename(name), ()) if f"/{path}".endswith(f"/{name}")]
        found = [name] if name in classes else ends
        if len(found) > 1:
            what = f"class {name!r} is found in several folders: {', '.join(found)}"
            raise DataError(what, "keep one of them, or list longer paths")
        below = (f"{folder}/" for folder in found)
        paths = [path for folder in found for path in classes.get(folder, ())] or [
            path for start in below for one, paths in classes.items() if one.startswith(start) for path in paths
        ]
        if not paths:
            what = f"class {name!r} is listed in {split!r}, but is absent from {where} or has no images"
            raise DataError(what, "add its images, or take it off the list")
        for path in paths:
            if path in user:
                what = f"image {path} is used twice: for class {user[path]!r} and for class {name!r}"
                raise DataError(what, "list each class and each image once")
            user[path] = name
        chosen[name] = split, paths
    if not chosen:
        raise DataError(f"{where} has no class to pack", "list one class a line in train.txt, val.txt, test.txt")
    return chosen


def _above(path: str) -> list[str]:
    """All folders above a path."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


def short_names(classes: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The classes named by their path below the folder that holds all of them."""
    top = posixpath.commonpath(map(posixpath.dirname, classes)) if classes else ""
    return {name.removeprefix(f"{top}/") if top else name: paths for name, paths in classes.items()}
