"""The one shape of a layout: what it needs, and a function from a tree of files to classes and their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from cml_dist.errors import DataError
from cml_dist.tools.sources.archives import Member
from cml_dist.tools.sources.tree import SourceTree, plain_name

SplitLists = Mapping[str, Sequence[str]]
"""The class names of each split, in their order."""


class Found(NamedTuple):
    """A source as its layout reads it: the paths of each class's pictures, the classes of each split, and the tree.

    ``splits`` is None where the source does not say, or need not; ``tree`` holds the pictures: the source, or one made
    of its arrays.
    """

    classes: Mapping[str, Sequence[str]]
    splits: SplitLists | None
    tree: SourceTree


class Layout(NamedTuple):
    """A way to keep a set of images; both functions are told whether the user gives the splits.

    Attributes:
        needs: what a source of this layout has, in words, and whether a tree has it (cheap: by names and first lines).
        read: raises DataError where the source contradicts itself.
    """

    needs: Mapping[str, Callable[[SourceTree, bool], object]]
    read: Callable[[SourceTree, bool], Found]


class Row(NamedTuple):
    """A picture that is kept in an array or a table: its place, and how to read it."""

    split: str
    class_name: str
    file: str
    member: Member


def gathered(tree: SourceTree, rows: Iterable[Row], own_splits: bool) -> Found:
    """The pictures as files ``class/file`` of a tree of their own, in the order of the rows."""
    members: dict[str, Member] = {}
    classes: dict[str, list[str]] = {}
    splits: dict[str, dict[str, None]] = {}
    for count, row in enumerate(rows, start=1):
        tree.check_count(count)
        name = plain_name(row.class_name)
        if not name:
            raise DataError(f"{tree.where} has a class without a name ({row.class_name!r})", "give each class a name")
        path = plain_name(f"{name}/{row.file}")
        members[path] = row.member
        classes.setdefault(name, []).append(path)
        splits.setdefault(row.split, {})[name] = None
    made = SourceTree(tree.where, members.items(), tree.limits)
    classes = {name: [path for path in paths if path in made.files] for name, paths in classes.items()}
    return Found(classes, None if own_splits else {split: list(names) for split, names in splits.items()}, made)
