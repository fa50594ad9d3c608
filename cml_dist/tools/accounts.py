"""What became of every file that packing met: each has one answer, so that the counts add up to the files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from cml_dist.errors import DataError
from cml_dist.tools.sources.tree import ARCHIVE, LOOP, SYSTEM, SourceTree

PACKED, DAMAGED = "packed", "cannot be decoded"
_READ, _UNUSED, _OTHER = "read as lists or arrays", "of no class that is packed", "no picture"
_ARCHIVE, _STRANGE = "an archive in the source (unpack it)", "a kind of picture that is not read (convert it)"
_PICTURE = re.compile(r"\.(heic|heif|avif|jxl|svg|cr2|cr3|nef|arw|dng|exr|hdr|eps|wmf|emf)$", re.IGNORECASE)
_NO_LOSS = (PACKED, _READ, _OTHER, SYSTEM, LOOP)


class Account(NamedTuple):
    """What became of files, how many they are, and the first of them."""

    what: str
    files: int
    example: str


class Accounts:
    """The account of a source, and of the pictures in its arrays where it has such.

    Attributes:
        packed: paths of the pictures that are in the set, or are to come.
        damage: what is wrong with the first picture that cannot be decoded.
        notes: what else may spoil results, in words.
    """

    def __init__(self, tree: SourceTree, pictures: SourceTree) -> None:
        self._trees = [tree] if pictures is tree else [tree, pictures]
        self._left: dict[str, str] = {}
        self._seen: dict[bytes, tuple[str, str]] = {}
        self._twice: dict[str, str] = {}
        self.packed: set[str] = set()
        self.damage: DataError | None = None
        self.notes: list[str] = []

    def leave_out(self, path: str, reason: str, error: DataError | None = None) -> None:
        """A picture will not be in the set; ``error``: what is wrong with itself."""
        self._left[path] = reason
        self.packed.discard(path)
        self.damage = self.damage or error

    def compare(self, digest: bytes, split: str, path: str) -> None:
        """Whether a picture with this checksum lies in another split too."""
        other, first = self._seen.setdefault(digest, (split, path))
        if other != split:
            self._twice[path] = f"{first} ({other}) and {path} ({split})"

    def warnings(self) -> tuple[str, ...]:
        """What may spoil results, in words."""
        said = list(self.notes)
        damaged = sum(reason == DAMAGED for reason in self._left.values())
        if damaged:
            said.append(f"{damaged:,} picture{'s' * (damaged != 1)} left out as damaged: {self.damage.what}")
        if self._twice:
            shown = "; ".join(list(self._twice.values())[:3]) + ("; ..." if len(self._twice) > 3 else "")
            said.append(f"the same pixels in two splits, {len(self._twice):,} times: {shown}")
        return tuple(said)

    def table(self) -> tuple[Account, ...]:
        """The files by what became of them: packed ones first, then the others by their number."""
        return tuple(
            one if one.what in (PACKED, _READ) else one._replace(what=f"left out: {one.what}") for one in self._all()
        )

    def losses(self) -> str:
        """What is left out though somebody may miss it, in words; empty: nothing."""
        lost = (one for one in self._all() if one.what not in _NO_LOSS)
        return "; ".join(f"{one.files:,} {one.what}, e.g. {one.example}" for one in lost)

    def _all(self) -> list[Account]:
        met: dict[str, list[str]] = {}
        for path, what in self._answers():
            met.setdefault(what, []).append(path)
        accounts = (Account(what, len(paths), paths[0]) for what, paths in met.items())
        return sorted(accounts, key=lambda one: (one.what != PACKED, -one.files))

    def _answers(self) -> Iterator[tuple[str, str]]:
        for tree in self._trees:
            images = set(tree.images)
            for path in tree.files:
                if path in self.packed:
                    yield path, PACKED
                elif path in self._left:
                    yield path, self._left[path]
                else:
                    other = _ARCHIVE if ARCHIVE.search(path) else _STRANGE if _PICTURE.search(path) else _OTHER
                    yield path, _READ if path in tree.used else _UNUSED if path in images else other
            yield from tree.left
