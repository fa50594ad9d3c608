"""``cml-dist data inspect``: what a packed set holds, as rows of a table and as a picture of a few episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cml_dist.data.base import episode_rng
from cml_dist.data.glyph_fonts import font_file
from cml_dist.data.groups import draw_parted
from cml_dist.data.pixels import to_image
from cml_dist.data.sampling import draw
from cml_dist.data.shards import ShardSet
from cml_dist.errors import DataError

_INK, _SUPPORT, _QUERY = "#1d2733", "#1f5fae", "#d8912f"
_GAP, _LINE, _TILE = 6, 26, 72  # pixels


COLUMNS = ("split", "classes", "images", "min", "median", "max", "shards", "MiB")
"""Of the table; min, median and max are images a class."""
GROUP_COLUMNS = ("groups", "a class")
"""Of a set with groups."""


def split_rows(shards: ShardSet) -> list[tuple]:
    """The table of a set: a row of ``COLUMNS`` for each split."""
    rows = []
    for split in shards.splits:
        sizes = np.array(shards.split_info(split).images)
        files = [shard for shard in shards.info.shards if shard.split == split]
        counts = int(sizes.min()), float(np.median(sizes)), int(sizes.max())
        size_mib = sum(file.size for file in files) / 2**20
        rows.append((split, len(sizes), int(sizes.sum()), *counts, len(files), round(size_mib, 1)))
    return rows


def group_cells(shards: ShardSet, split: str) -> tuple[object, ...]:
    """``GROUP_COLUMNS`` of a split: how many groups it has, and each of its classes; nothing without groups."""
    if (groups := shards.class_groups(split)) is None:
        return ()
    each = [len(np.unique(group)) for group in groups]
    return len(np.unique(np.concatenate(groups))), " to ".join(map(str, sorted({min(each), max(each)})))


def draw_contact_sheet(
    shards: ShardSet, path: Path, *, ways: int = 5, shots: int = 1, queries: int = 5, episodes: int = 1
) -> str:
    """Writes a PNG of a few episodes of each split: each row a class, support images left, query images right.

    They are the first episodes of seed 0, without augmentation. A set that is too small for the episodes asked for is
    shown in smaller ones: to look at it is to find out.

    Returns:
        What the sheet shows.

    Raises:
        DataError: if an image is damaged, or the file cannot be written.
    """
    infos = [shards.split_info(split) for split in shards.splits]
    ways = min(ways, *(len(info.classes) for info in infos))
    while any(shards.short_classes(split, shots, queries) for split in shards.splits):
        shots, queries = (shots, queries - 1) if queries else (shots - 1, 0)
    title = f"{ways} ways, {shots} shots (blue) and {queries} queries (orange)"
    lines: list[tuple[str, np.ndarray | None]] = [(f"{shards.name}: {title}", None)]
    for split in shards.splits:
        info = shards.split_info(split)
        sizes, groups = np.array(info.images), shards.class_groups(split)
        starts = shards.first_image(split) + np.cumsum(sizes) - sizes
        for index in range(episodes):
            lines.append((f"{split}, episode {index}", None))
            rng = episode_rng(0, split, index)
            shape = (ways, shots + queries) if groups is None else (ways, shots, queries)
            drawn = draw(rng, sizes, *shape) if groups is None else draw_parted(rng, groups, *shape)
            for number, chosen in zip(*drawn, strict=True):
                pixels = np.stack([shards.decode(int(starts[number] + image)) for image in chosen])
                lines.append((info.classes[number], pixels))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(lines, shots, shards.image_size).save(path, format="PNG")
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror or error})", "choose another file") from error
    return title


def _draw(lines: list[tuple[str, np.ndarray | None]], shots: int, image_size: tuple[int, int]) -> Image.Image:
    """Texts, each with images uint8 ``[N, C, H, W]`` or without, one below the other."""
    font = ImageFont.truetype(str(font_file("DejaVuSans")), 14)
    scale = _TILE / max(image_size)
    # Small images are enlarged without smoothing: the sheet shows the very pixels that the network gets.
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BICUBIC
    height, width = (max(1, round(side * (round(scale) if scale >= 1 else scale))) for side in image_size)
    left = 2 * _GAP + max(int(font.getlength(text)) for text, images in lines if images is not None)
    ends = [left + len(images) * (width + _GAP) for _, images in lines if images is not None]
    ends += [int(font.getlength(text)) + 2 * _GAP for text, _ in lines]
    heights = [_LINE if images is None else height + _GAP for _, images in lines]
    sheet = Image.new("RGB", (max(ends), sum(heights) + _LINE), "white")
    pen = ImageDraw.Draw(sheet)
    top = _GAP
    for (text, images), line_height in zip(lines, heights, strict=True):
        pen.text((_GAP, top + line_height // 2), text, _INK, font, anchor="lm")
        for column, pixels in enumerate(() if images is None else images):
            tile = to_image(pixels).resize((width, height), method).convert("RGB")
            tile = ImageOps.expand(tile, 2, _SUPPORT if column < shots else _QUERY)
            sheet.paste(tile, (left + column * (width + _GAP) - 2, top - 2))
        top += line_height
    return sheet
