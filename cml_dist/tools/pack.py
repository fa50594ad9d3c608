"""``cml-dist data pack``: any known layout of images becomes a shard set, whole or not at all."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from cml_dist.domains.pixels import MODES
from cml_dist.domains.publish import refuse_existing
from cml_dist.domains.shard_cache import is_remote
from cml_dist.domains.shard_format import Progress
from cml_dist.domains.shards import ShardSet, ShardSetWriter
from cml_dist.errors import DataError
from cml_dist.tools.fit_image import Fitted, fit_image, size_and_channels
from cml_dist.tools.sources.known_splits import CIFAR100_SPLITS
from cml_dist.tools.sources.layouts import recognise
from cml_dist.tools.sources.lists import Splits
from cml_dist.tools.sources.tree import Item, open_source

_A = TypeVar("_A")
_B = TypeVar("_B")

_CHUNK_IMAGES = 32
_CHUNKS_AHEAD = 16
_MAX_THREADS = 8


@dataclass(frozen=True)
class PackReport:
    """What was packed.

    Attributes:
        dest: the folder of the set.
        name: its name.
        layout: the layout of the source.
        image_size: height and width.
        channels: 1 or 3.
        num_classes: by split.
        num_images: by split.
        num_kept: images whose bytes were kept as they are.
        num_converted: images that were resized, or stored as another kind of file.
        size_bytes: of all shards.
    """

    dest: Path
    name: str
    layout: str
    image_size: tuple[int, int]
    channels: int
    num_classes: dict[str, int]
    num_images: dict[str, int]
    num_kept: int
    num_converted: int
    size_bytes: int


def pack(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    layout: str | None = None,
    splits: Splits = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    name: str | None = None,
    shard_size_mib: float = 64,
    progress: Progress | None = None,
) -> PackReport:
    """Packs a source of images into a new shard set.

    Args:
        source: a folder or a zip (or ``cifar-100-python.tar.gz``).
        dest: the folder to make.
        layout: ``folders``, ``ravi``, ``cifar100`` or ``omniglot``; None: recognised.
        splits: ``"cifar_fs"`` or ``"fc100"`` for CIFAR-100; or a folder of ``train.txt``, ``val.txt``, ``test.txt``;
            or class names by split; None: as found in the source.
        image_size: pixels a side, or (height, width); images of another size are resized. None: the size that all
            images have (28 for the published Omniglot).
        channels: 1 (grey) or 3 (RGB); None: that of the first image.
        name: of the set; None: the name of the source, or of the splits of CIFAR-100.
        shard_size_mib: size at which a new shard is begun, MiB.
        progress: called with images done and total.

    Returns:
        What was packed.

    Raises:
        DataError: if ``dest`` exists, the source is not recognised or contradicts itself, or an image is unreadable
            (named). Nothing is left at ``dest`` then.
    """
    _check_arguments(dest, channels)
    tree = open_source(source)
    chosen = recognise(tree, layout, splits)
    items = chosen.items(tree, splits)
    _check_items(items, tree.where)
    first_size, first_channels = size_and_channels(items[0].read(), _what(items[0]))
    asked_size = image_size if image_size is not None else chosen.image_size
    resize = asked_size is not None
    size = _as_pair(asked_size) if asked_size is not None else first_size
    channels = channels if channels is not None else first_channels
    path = Path(source)
    if name is None and chosen.name == "cifar100" and isinstance(splits, str) and splits in CIFAR100_SPLITS:
        name = splits  # one source, several sets
    name = name or path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".zip")

    def prepare(item: Item) -> tuple[Item, Fitted]:
        return item, fit_image(item.read(), _what(item), size, channels, resize)

    num_kept = 0
    with ShardSetWriter(
        dest, name=name, image_size=size, channels=channels, source=path.name, shard_size_mib=shard_size_mib
    ) as writer:
        for done, (item, fitted) in enumerate(_ahead(prepare, items), start=1):
            writer.add(item.split, item.class_name, item.key, fitted.data, fitted.ext, pixels=fitted.pixels)
            num_kept += fitted.kept
            if progress is not None:
                progress(done, len(items), "packing images")
    return _report(Path(dest), chosen.name, num_kept)


def _check_arguments(dest: str | os.PathLike[str], channels: int | None) -> None:
    if is_remote(os.fspath(dest)):
        raise DataError(f"destination {dest} is remote", "pack into a local folder, then upload the folder as it is")
    refuse_existing(Path(dest))
    if channels is not None and channels not in MODES:
        raise DataError(f"channels is {channels}", f"use one of {sorted(MODES)}")


def _check_items(items: list[Item], where: str) -> None:
    if not items:
        raise DataError(f"{where} has no image to pack", "check the source and its lists")
    owner: dict[str, Item] = {}
    for item in items:
        other = owner.setdefault(item.path, item)
        if other is not item:
            raise DataError(
                f"image {item.path} is used twice: for class {other.class_name!r} in {other.split!r} and for "
                f"{item.class_name!r} in {item.split!r}",
                "list each image once",
            )


def _what(item: Item) -> str:
    return f"image {item.path} of class {item.class_name!r}"


def _as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(pair) < 1:
        raise DataError(f"image size is {pair[0]}x{pair[1]}", "give at least 1 pixel")
    return pair


def _ahead(function: Callable[[_A], _B], arguments: Iterable[_A]) -> Iterator[_B]:
    """Results in order, computed by threads a bounded number of chunks ahead.

    In chunks, for small images take less time to decode than a thread takes to be woken.
    """
    source = iter(arguments)
    pool = ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))))
    waiting: deque[Future[list[_B]]] = deque()
    try:
        while chunk := list(islice(source, _CHUNK_IMAGES)):
            waiting.append(pool.submit(lambda chunk: [function(argument) for argument in chunk], chunk))
            if len(waiting) > _CHUNKS_AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _report(dest: Path, layout: str, num_kept: int) -> PackReport:
    """Read back from what was published, so that it says what is there."""
    shards = ShardSet.open(dest)
    splits = {split: shards.split_info(split) for split in shards.splits}
    return PackReport(
        dest=dest,
        name=shards.name,
        layout=layout,
        image_size=shards.image_size,
        channels=shards.channels,
        num_classes={split: len(info.classes) for split, info in splits.items()},
        num_images={split: sum(info.images) for split, info in splits.items()},
        num_kept=num_kept,
        num_converted=len(shards) - num_kept,
        size_bytes=sum(shards.size_on_disk(split) for split in shards.splits),
    )
