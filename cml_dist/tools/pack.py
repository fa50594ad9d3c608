"""``cml-dist data pack``: any known layout of images becomes a shard set, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from cml_dist.data.base import Progress
from cml_dist.data.pixels import MODES, Picture, in_threads, size_and_channels
from cml_dist.data.publish import refuse_existing
from cml_dist.data.shard_cache import is_remote
from cml_dist.data.shard_writer import new_shard_set
from cml_dist.data.shards import ShardSet
from cml_dist.errors import DataError
from cml_dist.tools.fit_image import fit_image
from cml_dist.tools.sources.known_splits import CIFAR100_SPLITS
from cml_dist.tools.sources.layouts import LAYOUTS, Item, Splits, find_items, recognise
from cml_dist.tools.sources.tree import open_source


class PackReport(NamedTuple):
    """What was packed: the set, the layout of its source, and how many images kept their bytes."""

    shards: ShardSet
    layout: str
    num_kept: int


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
        layout: one of ``LAYOUTS``; None: recognised.
        splits: ``"cifar_fs"`` or ``"fc100"`` for CIFAR-100; or a folder of ``train.txt``, ``val.txt``, ``test.txt``;
            or class names by split; None: as found in the source.
        image_size: pixels a side, or (height, width); images of another size are resized. None: the size that all
            images have (28 for the published Omniglot).
        channels: 1 (grey) or 3 (RGB); None: that of the first image.
        name: of the set; None: the name of the source, or of the splits of CIFAR-100.
        shard_size_mib: size at which a new shard is begun, MiB.
        progress: called with images done and total.

    Raises:
        DataError: if ``dest`` exists, the source is not recognised or contradicts itself, or an image is unreadable
            (named). Nothing is left at ``dest`` then.
    """
    if is_remote(os.fspath(dest)):
        raise DataError(f"destination {dest} is remote", "pack into a local folder, then upload the folder as it is")
    refuse_existing(Path(dest))
    for what, value, known in (("channels", channels, MODES), ("layout", layout, LAYOUTS)):
        if value is not None and value not in known:
            raise DataError(f"{what} is {value!r}", f"use one of {', '.join(map(str, known))}")
    tree = open_source(source)
    layout = layout or recognise(tree, splits)
    items = find_items(tree, layout, splits)
    size, found_channels = size_and_channels(items[0].read(), items[0].what)
    if image_size is None and layout == "omniglot":
        image_size = 28
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(size) < 1:
        raise DataError(f"image size is {size[0]}x{size[1]}", "give at least 1 pixel")
    channels = channels or found_channels
    file = Path(source).name
    if name is None and layout == "cifar100" and isinstance(splits, str) and splits in CIFAR100_SPLITS:
        name = splits  # one source, several sets
    name = name or file.removesuffix(".gz").removesuffix(".tar").removesuffix(".zip")

    def fit(item: Item) -> tuple[Picture, bool]:
        data = item.read()
        picture = fit_image(data, item.what, size, channels, resize=image_size is not None)
        return picture, picture.data is data

    num_kept, about = 0, {"name": name, "image_size": size, "channels": channels, "source": file}
    with new_shard_set(dest, **about, shard_size_mib=shard_size_mib) as writer:
        for done, (item, (picture, kept)) in enumerate(zip(items, in_threads(fit, items), strict=True), start=1):
            writer.add(item.split, item.class_name, item.key, picture)
            num_kept += kept
            if progress is not None:
                progress(done, len(items), "packing images")
    return PackReport(ShardSet.open(dest), layout, num_kept)
