"""Omniglot as published: ``images_background`` and ``images_evaluation``, as zips or unpacked."""

from __future__ import annotations

from cml_dist.domains.base import SPLITS
from cml_dist.errors import DataError
from cml_dist.tools.sources.known_splits import omniglot_split
from cml_dist.tools.sources.lists import Splits, read_lists
from cml_dist.tools.sources.tree import Item, SourceTree, items_of

OMNIGLOT_PARTS = ("images_background", "images_evaluation")


def fits(tree: SourceTree, splits: Splits) -> bool:
    return any(part in path.split("/")[:-1] for path in tree.paths for part in OMNIGLOT_PARTS)


def items(tree: SourceTree, splits: Splits) -> list[Item]:
    classes = _omniglot_classes(tree)
    given = read_lists(tree, splits) if splits is not None else None
    if given is None:
        names: dict[str, list[str]] = {split: [] for split in SPLITS}
        for name in classes:
            names[omniglot_split(name)].append(name)
        given = names
    missing = [(name, split) for split, listed in given.items() for name in listed if name not in classes]
    if missing:
        raise DataError(
            f"class {missing[0][0]!r} is listed in {missing[0][1]!r}, but is absent from {tree.where}",
            "correct the list",
        )
    return [
        item for split in SPLITS for name in given.get(split, ()) for item in items_of(tree, split, name, classes[name])
    ]


def _omniglot_classes(tree: SourceTree) -> dict[str, list[str]]:
    """Images of each ``Alphabet/characterNN``, sorted by name, from both parts.

    Raises:
        DataError: if one of the parts is absent.
    """
    classes: dict[str, list[str]] = {}
    seen = set()
    for path in tree.images():
        parts = path.split("/")
        for part in OMNIGLOT_PARTS:
            if part in parts[:-3]:
                seen.add(part)
                classes.setdefault("/".join(parts[parts.index(part) + 1 : -1]), []).append(path)
    absent = [part for part in OMNIGLOT_PARTS if part not in seen]
    if absent:
        raise DataError(
            f"{tree.where} has no images below {' and '.join(absent)}",
            f"give a folder with both {' and '.join(OMNIGLOT_PARTS)}, as zips or unpacked",
        )
    return {name: classes[name] for name in sorted(classes)}
