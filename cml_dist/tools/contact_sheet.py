"""A picture of few-shot episodes: each row a class, its support images left and its query images right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cml_dist.domains.images import ImageDomain
from cml_dist.errors import DataError

_PAPER, _INK, _FAINT, _FRAME = "#ffffff", "#1d2733", "#6b7785", "#d7dde3"
_SUPPORT, _QUERY = "#e8f0fb", "#fdf3e3"
_SUPPORT_INK, _QUERY_INK = "#1f5fae", "#a8670c"
_MARGIN, _GAP, _GUTTER, _TITLE, _HEADER = 24, 6, 18, 34, 26
_NAME_WIDTHS = (90, 320)  # least and most room for class names, pixels
_LABEL_WIDTH = 30


def draw_contact_sheet(domain: ImageDomain, shown: Sequence[tuple[str, int]], path: Path) -> None:
    """Writes a PNG of the given episodes, one below the other.

    Args:
        domain: where the episodes come from.
        shown: (split, index) of each.
        path: the file to write; an existing one is replaced.

    Raises:
        DataError: if the file cannot be written.
    """
    name_width = _name_width(domain, shown)
    blocks = [_draw_episode(domain, split, index, name_width) for split, index in shown]
    title = _draw_title(domain, max(block.width for block in blocks))
    parts = [title, *blocks]
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), _PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror or error})", "choose another file") from error


def _draw_title(domain: ImageDomain, width: int) -> Image.Image:
    channels, height, wide = domain.input_shape
    kind = "grey" if channels == 1 else "RGB"
    settings = domain.settings
    block = Image.new("RGB", (width, _MARGIN + 56), _PAPER)
    pen = ImageDraw.Draw(block)
    pen.text(
        (_MARGIN, _MARGIN), _fitting(domain.shards.name, 22, width - 2 * _MARGIN, bold=True), _INK, _font(22, True)
    )
    text = f"{settings.ways}-way {settings.shots}-shot, {settings.queries} queries a class; {height}x{wide} {kind}"
    pen.text((_MARGIN, _MARGIN + 30), _fitting(text, 13, width - 2 * _MARGIN), _FAINT, _font(13))
    return block


def _draw_episode(domain: ImageDomain, split: str, index: int, name_width: int) -> Image.Image:
    settings = domain.settings
    episode = domain.episode(split, index)
    tile = _tile_size(domain)
    support_left = _MARGIN + _LABEL_WIDTH + name_width
    support_width = _columns(settings.shots, tile[0])
    query_left = support_left + support_width + _GUTTER
    query_width = _columns(settings.queries, tile[0]) if settings.queries else 0
    rows_height = settings.ways * (tile[1] + _GAP) + _GAP
    top = _TITLE + _HEADER
    block = Image.new("RGB", (query_left + max(query_width, 60) + _MARGIN, top + rows_height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(block)
    pen.text((_MARGIN, 4), f"{split}, episode {index}", _INK, _font(15, True))
    sides = (
        ("support", support_left, support_width, settings.shots, episode.support.inputs, _SUPPORT, _SUPPORT_INK),
        ("query", query_left, query_width, settings.queries, episode.query.inputs, _QUERY, _QUERY_INK),
    )
    for label, left, width, columns, images, fill, ink in sides:
        if columns:
            pen.text((left + _GAP, _TITLE + 4), label, ink, _font(13, True))
            pen.rounded_rectangle((left, top, left + width, top + rows_height), radius=6, fill=fill)
            _paste_tiles(block, images, (left + _GAP, top + _GAP), columns, tile)
    for label, name in enumerate(domain.episode_classes(split, index)):
        middle = top + _GAP + label * (tile[1] + _GAP) + tile[1] // 2
        pen.text((_MARGIN, middle), str(label), _FAINT, _font(13), anchor="lm")
        pen.text((_MARGIN + 20, middle), _fitting(name, 13, name_width), _INK, _font(13), anchor="lm")
    return block


def _name_width(domain: ImageDomain, shown: Sequence[tuple[str, int]]) -> int:
    names = [name for split, index in shown for name in domain.episode_classes(split, index)]
    longest = max(_font(13).getlength(name) for name in names)
    return int(min(max(longest + 1, _NAME_WIDTHS[0]), _NAME_WIDTHS[1]))


def _paste_tiles(
    block: Image.Image, images: Tensor, corner: tuple[int, int], columns: int, tile: tuple[int, int]
) -> None:
    pen = ImageDraw.Draw(block)
    for number, pixels in enumerate(images.numpy()):
        row, column = divmod(number, columns)
        left, top = corner[0] + column * (tile[0] + _GAP), corner[1] + row * (tile[1] + _GAP)
        picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        # Small images are enlarged without smoothing: the sheet shows the very pixels that the network gets.
        enlarge = tile[0] >= picture.width
        picture = picture.resize(tile, Image.Resampling.NEAREST if enlarge else Image.Resampling.BICUBIC)
        block.paste(picture.convert("RGB"), (left, top))
        pen.rectangle((left - 1, top - 1, left + tile[0], top + tile[1]), outline=_FRAME)


def _tile_size(domain: ImageDomain) -> tuple[int, int]:
    """Width and height on the sheet: a whole multiple of small images, at most 96 pixels of large ones."""
    _, height, width = domain.input_shape
    longest = max(height, width)
    if longest <= 96:
        times = max(1, round(72 / longest))
        return width * times, height * times
    return max(1, width * 96 // longest), max(1, height * 96 // longest)


def _columns(count: int, width: int) -> int:
    return count * (width + _GAP) + _GAP


@lru_cache(maxsize=16)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    file = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", file)), size)


def _fitting(text: str, size: int, width: int, bold: bool = False) -> str:
    """The text, cut at its beginning where it is too wide: the end of a class path tells classes apart."""
    font = _font(size, bold)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("\u2026" + text) > width:
        text = text[1:]
    return "\u2026" + text
