"""``cml-dist data pack``: any known layout of images becomes a shard set, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cml_dist.data.base import SPLITS, Progress
from cml_dist.data.pixels import MODES, Picture
from cml_dist.data.publish import refuse_existing
from cml_dist.data.shard_cache import is_remote
from cml_dist.data.shard_writer import ShardSetWriter, new_shard_set
from cml_dist.data.shards import ShardSet
from cml_dist.errors import DataError
from cml_dist.registry import DOMAINS
from cml_dist.tools.accounts import DAMAGED, Account, Accounts
from cml_dist.tools.fit_image import fit_image
from cml_dist.tools.sources.known_splits import divided, download_set, known_sets, recognised
from cml_dist.tools.sources.layouts import LAYOUTS, choose, recognise, short_names
from cml_dist.tools.sources.shape import Found
from cml_dist.tools.sources.splits import Splits, draw_splits, read_lists, shares_of
from cml_dist.tools.sources.tree import Limits, OverLimit, SourceTree, natural_order, open_source
from cml_dist.tools.survey import Item, by_threads, chosen_size, large_enough, pixel_limit, survey

SHARES, LEAST = (64, 16, 20), 2
"""Shares by which classes are drawn where nobody says which split they belong to, and the fewest for each split."""


class PackReport(NamedTuple):
    """What was packed.

    Attributes:
        known: the name of the published set and split that it is; None: none that is known.
        num_kept: images that kept their bytes.
        accounts: what became of each file of the source, and of each picture in its arrays.
        warnings: what may spoil results, in words.
        chosen: what nobody had said and was chosen, and why, in words.
    """

    shards: ShardSet
    layout: str
    known: str | None
    num_kept: int
    accounts: tuple[Account, ...]
    warnings: tuple[str, ...]
    chosen: tuple[str, ...]


def pack(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    download: str | None = None,
    layout: str | None = None,
    splits: Splits = None,
    split_seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    name: str | None = None,
    min_images: int = 2,
    group_by: str | None = None,
    strict: bool = False,
    limits: Limits | None = None,
    shard_size_mib: float = 64,
    progress: Progress | None = None,
) -> PackReport:
    """Packs a source of images into a new shard set.

    Args:
        source: a folder, or a zip or tar.
        dest: the folder to make; what must be unpacked to be read lies beside it for as long.
        download: the known set whose archives are brought into the folder ``source`` first.
        layout: one of ``LAYOUTS``; None: recognised.
        splits: the name of a known set, e.g. ``"cifar_fs"``; shares of train, val and test by which whole classes are
            drawn, e.g. ``"64,16,20"``; a folder of ``train.txt``, ``val.txt``, ``test.txt``; or class names by split;
            None: as found in the source, or else as published for the set that it is, or else drawn by ``SHARES``.
        split_seed: of the draw.
        image_size: pixels a side, or (height, width); images of another size are resized. None: the size that all
            images have, up to 224 pixels on the shorter side; where they differ, and for the published Omniglot, the
            one usual for the known set, or else one chosen from them.
        channels: 1 (grey) or 3 (RGB); None: grey where all images are.
        name: of the set; None: that of the known set whose split is made, or of the source.
        min_images: a class of fewer is left out; 2: one support and one query image.
        group_by: a regular expression on a picture's path in the source; its first group, or else the whole match, is
            the picture's group. No episode has a group in both support and query set, and classes of one group are left
            out.
        strict: a picture that is left out is an error.
        limits: what the source may ask for; None: ``Limits()``.
        shard_size_mib: size at which a new shard is begun, MiB.
        progress: called with images done and total.

    Raises:
        DataError: if ``dest`` exists, the source is not recognised, contradicts itself or asks for more than the
            limits. Nothing is left at ``dest`` then.
    """
    if is_remote(os.fspath(dest)):
        raise DataError(f"destination {dest} is remote", "pack into a local folder, then upload the folder as it is")
    refuse_existing(Path(dest))
    layout = "csv" if layout == "ravi" else layout  # its name in earlier versions
    choices = (("channels", channels, MODES), ("layout", layout, LAYOUTS), ("download", download, known_sets()))
    for what, value, some in choices:
        if value is not None and value not in some:
            raise DataError(f"{what} is {value!r}", f"use one of {', '.join(map(str, some))}")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    for what, least in (("image size", min(size or (1,))), ("min_images", min_images)):
        if least < 1:
            raise DataError(f"{what} is {least}", "give at least 1")
    pattern = None if group_by is None else _compiled(group_by)
    limits = limits or Limits()
    if download is not None:
        download_set(download, source)
        splits = download if splits is None else splits
    with pixel_limit(limits.pixels):
        beside = next(folder for folder in Path(dest).absolute().parents if folder.is_dir())
        tree = open_source(source, limits, beside)
        layout = layout or recognise(tree, splits is not None)
        tree.used.clear()  # what was only looked at
        found = LAYOUTS[layout].read(tree, splits is not None)
        accounts = Accounts(tree, found.tree)
        items, divided_as, shares = _items(tree, found, layout, splits)
        known, unlike = _compared(divided_as, items)
        accounts.notes += unlike
        items = items if pattern is None else _grouped(tree.where, items, pattern)
        items, facts = survey(found.tree, items, accounts, progress)
        items = large_enough(items, accounts, min_images)
        chosen = []
        if shares:
            items = _drawn(tree.where, items, shares, split_seed, LEAST if splits is None else 0)
            if splits is None:
                chosen.append(_told(items, split_seed))
        accounts.packed = {item.path for item in items}
        accounts.notes += [] if pattern is None else _told_of_groups(items)
        if strict and (losses := accounts.losses()):
            raise DataError(f"pictures would be left out: {losses}", "mend or remove them, or pack without --strict")
        if size is None and (layout == "omniglot" or known and len({facts[item.path].size for item in items}) > 1):
            size = DOMAINS[known or layout].usual_inputs[1:]
        resize = size is not None
        if size is None:
            size, why = chosen_size(items, facts)
            resize, chosen = bool(why), [*chosen, *filter(None, [why])]
        channels = channels or max(facts[item.path].channels for item in items)

        file = Path(source).resolve().name
        name = name or divided_as or file.removesuffix(".gz").removesuffix(".tar").removesuffix(".zip")
        about = {"name": name, "image_size": size, "channels": channels, "source": file, "group_by": group_by}
        num_kept = None
        while num_kept is None:
            with suppress(_TooFew), new_shard_set(dest, **about, shard_size_mib=shard_size_mib) as writer:
                num_kept = _write(writer, found.tree, items, accounts, resize, strict, progress)
                left = [item for item in items if item.path in accounts.packed]
                items = large_enough(left, accounts, min_images)
                if len(items) < len(left):
                    num_kept = None
                    raise _TooFew
    shards, account, warnings = ShardSet.open(dest), accounts.table(), accounts.warnings()
    return PackReport(shards, layout, known, num_kept, account, warnings, tuple(chosen))


class _TooFew(Exception):
    """Damaged pictures left a class too small after its others were written: the set is written again without it."""


def _write(
    writer: ShardSetWriter,
    tree: SourceTree,
    items: Sequence[Item],
    accounts: Accounts,
    resize: bool,
    strict: bool,
    progress: Progress | None,
) -> int:
    """Writes all items that can be decoded; returns how many kept their bytes."""

    def fit(item: Item) -> tuple[Picture, bool, bytes] | DataError:
        try:
            data = tree.read(item.path)
            picture = fit_image(data, item.what, writer.image_size, writer.channels, resize)
        except DataError as error:
            if strict or isinstance(error, OverLimit):
                raise
            return error
        return picture, picture.data is data, hashlib.sha256(picture.pixels.tobytes()).digest()

    num_kept = 0
    for done, (item, result) in enumerate(zip(items, by_threads(fit, items), strict=True), start=1):
        if isinstance(result, DataError):
            accounts.leave_out(item.path, DAMAGED, result)
        else:
            picture, kept, digest = result
            stem = posixpath.splitext(posixpath.basename(item.path))[0]
            writer.add(item.split, item.class_name, f"{item.class_name}/{stem}", picture, item.group)
            num_kept += kept
            accounts.compare(digest, item.split, item.path)
        if progress is not None:
            progress(done, len(items), "packing images")
    return num_kept


def _items(
    tree: SourceTree, found: Found, layout: str, splits: Splits
) -> tuple[list[Item], str | None, Sequence[float] | None]:
    """The pictures of all classes that are asked for, the known set that this makes, and shares to draw splits by.

    Classes that are to be drawn are in ``train`` for now.
    """
    classes, lists, known, shares = found.classes, found.splits, None, shares_of(splits)
    if shares:
        pass
    elif isinstance(splits, str) and splits in known_sets():
        known = splits
    elif splits is not None:
        lists = read_lists(tree, splits)
    elif lists is None or sum(len(set(part)) for part in lists.values()) > len(set().union(*lists.values())):
        names = [layout] if layout in known_sets() else recognised(classes)
        known = names[0] if len(names) == 1 else None
        if known is None and names:
            raise DataError(
                f"{tree.where} says nowhere which class belongs to which split",
                f"say which: --splits {' or --splits '.join((*names, 'FOLDER'))} with train.txt, val.txt, test.txt, or "
                "shares to draw by, e.g. 64,16,20",
            )
        if known is None and lists is None:
            _refuse_doubles(tree, classes)
            shares = SHARES
    if shares:
        classes = {name: paths for name, paths in short_names(classes).items() if name}  # '': beside the class folders
        lists = {"train": sorted(classes, key=natural_order)}
    if known:
        classes, lists = divided(known, classes, tree.where, layout == "omniglot" and splits is None)
    chosen = choose(tree.where, classes, lists)
    size = {path: member.size for path, member in found.tree.files.items()}
    items = [Item(split, name, path, size[path]) for name, (split, paths) in chosen.items() for path in paths]
    return items, known, shares


def _compiled(group_by: str) -> re.Pattern[str]:
    try:
        return re.compile(group_by)
    except re.error as error:
        raise DataError(f"--group-by {group_by!r} is no regular expression ({error})", "correct it") from error


def _grouped(where: str, items: Sequence[Item], pattern: re.Pattern[str]) -> list[Item]:
    """The items with their groups.

    Raises:
        DataError: the pattern matches some of them alone, or none.
    """
    found = [pattern.search(item.path) for item in items]
    if None in found:
        count, first = sum(match is not None for match in found), items[found.index(None)].path
        what = f"--group-by {pattern.pattern!r} matches {count or 'none'} of {len(items):,} pictures in {where}"
        raise DataError(f"{what} (not {first}, for one)", "write a pattern that matches the path of each picture")
    names = ((match[1] if pattern.groups else None) or match[0] for match in found)
    return [item._replace(group=name) for item, name in zip(items, names, strict=True)]


def _told_of_groups(items: Sequence[Item]) -> list[str]:
    """What may be meant otherwise, in words."""
    splits: dict[str | None, set[str]] = {}
    for item in items:
        splits.setdefault(item.group, set()).add(item.split)
    said = ["each picture is a group of its own: --group-by changes nothing"] * (len(splits) == len(items))
    if several := [name for name, some in splits.items() if len(some) > 1]:
        shown = ", ".join(map(repr, several[:3])) + (", ..." if len(several) > 3 else "")
        said.append(f"{len(several):,} groups have pictures in two splits: {shown}")
    return said


def _refuse_doubles(tree: SourceTree, classes: Mapping[str, Sequence[str]]) -> None:
    """Raise DataError where a class may lie in two folders: drawn apart, it would be trained on and tested on."""
    seen: dict[str, str] = {}
    for path in classes:
        if (other := seen.setdefault(posixpath.basename(path), path)) != path:
            what = f"{tree.where} has {posixpath.basename(path)} twice, {other} and {path}"
            raise DataError(what, "put them into one folder if they are one class, or say how to divide: --splits")


def _compared(known: str | None, items: Sequence[Item]) -> tuple[str | None, list[str]]:
    """The known set that the items are, also where its split is their own; and in words how their numbers differ."""
    names = {split: {item.class_name for item in items if item.split == split} for split in SPLITS}
    here, words = (len(items), *map(len, names.values())), "{:,} images and {}/{}/{} classes"
    for name, about in known_sets().items():
        if known == name or known is None and names == {split: set(about.splits[split]) for split in SPLITS}:
            has = about.images, *about.classes
            unlike = f"{name} as published has {words.format(*has)}; here are {words.format(*here)}"
            return name, [unlike] * (has != here)
    return None, []


def _drawn(where: str, items: Sequence[Item], shares: Sequence[float], seed: int, least: int) -> list[Item]:
    """The items with whole classes drawn for each split.

    Raises:
        DataError: if there are too few classes.
    """
    names = sorted({item.class_name for item in items}, key=natural_order)
    if len(names) < (needed := least * len(SPLITS)):
        raise DataError(
            f"{where} has {len(names)} class{'es' * (len(names) != 1)}, but training needs {needed}: {least} each to "
            "train, validate and test on, since a meta-learner is tested on classes that it never saw",
            "add classes; or for few classes take a learner that was trained on others, which needs no packed set: "
            "cml-dist predict RUN --support FOLDER --images FOLDER",
        )
    split_of = {name: split for split, some in draw_splits(names, shares, seed, least).items() for name in some}
    items = [item._replace(split=split_of[item.class_name]) for item in items]
    return sorted(items, key=lambda item: SPLITS.index(item.split))


def _told(items: Sequence[Item], seed: int) -> str:
    """Which classes were drawn and why, and how to choose otherwise."""
    names = {split: {item.class_name for item in items if item.split == split} for split in SPLITS}
    counts = ", ".join(f"{len(some)} to {split}" for split, some in names.items())
    return (
        f"Nothing says which class belongs to which split: whole classes were drawn (seed {seed}), {counts}. None is "
        "in two, since a meta-learner is tested on classes that it never saw. To choose otherwise: --split-seed SEED, "
        "or --splits with shares (60,20,20) or a FOLDER of train.txt, val.txt, test.txt"
    )
