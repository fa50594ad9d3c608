"""The image sets of the field as published: the split of their classes, their numbers, and where their archives are."""

from __future__ import annotations

import json
import os
import posixpath
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from cml_dist.data.base import SPLITS
from cml_dist.errors import DataError


class KnownSet(NamedTuple):
    """A set of ``class_splits.json``: how many classes a split has, and images all have; files with address and MD5.

    A name in ``splits`` is a class's, with other names of it after ``|``, or that of a folder of classes, with ``/``.
    """

    title: str
    source: str
    licence: str
    classes: Sequence[int]
    images: int
    files: Mapping[str, Sequence[str] | None]
    splits: Mapping[str, Sequence[str]]


@cache
def known_sets() -> dict[str, KnownSet]:
    """All sets whose split is known, by name."""
    text = Path(__file__).with_name("class_splits.json").read_text(encoding="utf-8")
    return {name: KnownSet(**about) for name, about in json.loads(text).items()}


def _key(name: str) -> str:
    """A name without what copies of a set write differently: case, signs, zeros before a number."""
    return re.sub(r"[\W_]+", " ", name.lower()).strip().lstrip("0") + "/" * name.endswith("/")


def _found(known: str, classes: Iterable[str]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """For each split and entry of a set, in their order: the published names and the paths of a source's classes."""
    pairs = [(split, entry.split("|")) for split in SPLITS for entry in known_sets()[known].splits[split]]
    entries = {_key(name): (split, names[0]) for split, names in pairs for name in names}
    found: dict[tuple[str, str], list[tuple[str, str]]] = {entry: [] for entry in entries.values()}
    for path in classes:
        two = "/".join(path.split("/")[-2:])
        keys = _key(two), _key(posixpath.basename(two)), _key(f"{posixpath.dirname(two)}/")
        if entry := next((entries[key] for key in keys if key in entries), None):
            found[entry].append((two if entry[1].endswith("/") else entry[1], path))
    return found


def recognised(classes: Iterable[str]) -> list[str]:
    """The known sets of which all classes are there, or else those of which most are, at least half.

    A mere number is no name by which a set can be recognised.
    """
    names = [name for name in classes if not posixpath.basename(name).isdigit()]
    found = {known: list(map(bool, _found(known, names).values())) for known in known_sets()}
    part = {known: sum(entries) / len(entries) for known, entries in found.items()}
    return [known for known in part if part[known] == max(0.5, *part.values())]


def divided(
    known: str, classes: Mapping[str, Sequence[str]], where: str, partial: bool
) -> tuple[dict[str, Sequence[str]], dict[str, list[str]]]:
    """The pictures of a set's classes by their published names, and the names of each split.

    Raises:
        DataError: if the source has a class twice, or lacks one and is not to be ``partial``.
    """
    found = _found(known, classes)
    missing = [name for (_, name), pairs in found.items() if not pairs]
    if missing and not partial:
        raise DataError(
            f"{where} is a part of {known}: {len(missing)} of {len(found)} names are absent: {', '.join(missing[:3])}",
            f"add them ({' and '.join(known_sets()[known].files)}), or draw other splits: --splits 64,16,20",
        )
    paths: dict[str, str] = {}
    for name, path in [pair for pairs in found.values() for pair in pairs]:
        if paths.setdefault(name, path) is not path:
            what = f"class {name!r} is found in several folders: {paths[name]}, {path}"
            raise DataError(what, "keep one of them, or give the folder that holds it")
    lists = {one: [name for (split, _), pairs in found.items() if split == one for name, _ in pairs] for one in SPLITS}
    return {name: classes[path] for name, path in paths.items()}, lists


def download_set(known: str, folder: str | os.PathLike[str]) -> None:
    """Downloads the archives that the folder lacks, and compares their checksums.

    Raises:
        DataError: saying which files to put where, if the set has no download or the network fails.
    """
    about, before = known_sets()[known], socket.getdefaulttimeout()
    put = f"put {' and '.join(about.files)} into {folder}, then pack it with --splits {known} in place of --download"
    if None in about.files.values():
        raise DataError(f"{about.title} cannot be downloaded", put)
    from torchvision.datasets.utils import download_url

    socket.setdefaulttimeout(30)  # s of silence
    try:
        for file, (address, md5) in about.files.items():
            download_url(address, os.fspath(folder), file, md5)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(f"{about.title} cannot be downloaded: {address}: {error}", put) from error
    finally:
        socket.setdefaulttimeout(before)
