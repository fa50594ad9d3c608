"""Which characters are classes of Glyphs, and their outlines: read from the fonts that ship inside matplotlib."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cml_dist.errors import DataError

if TYPE_CHECKING:
    from matplotlib.path import Path as Outline

SCRIPTS = {
    "LATIN": "train",
    "GREEK": "train",
    "CYRILLIC": "train",
    "COPTIC": "train",
    "OLD ITALIC": "train",
    "LISU": "train",
    "CANADIAN SYLLABICS": "train",
    "OGHAM": "train",
    "ARMENIAN": "val",
    "HEBREW": "val",
    "NKO": "val",
    "LAO": "val",
    "GEORGIAN": "test",
    "ARABIC": "test",
    "TIFINAGH": "test",
}
"""Split of each script (the first words of a Unicode name); those nearest to Latin in shape are for training."""

UNICODE_FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Oblique", "-Bold", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Oblique", "-Bold", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Italic", "-Bold", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Italic", "Bol", "BolIta")),
)
TEX_FACES = ("cmr10", "cmti10", "cmb10", "cmss10", "cmtt10", "cmmi10")
"""Computer Modern: its character codes are TeX's, so that its glyphs are known by name."""

FACES = UNICODE_FACES + TEX_FACES

SAME_SHAPE = 0.96
"""Cosine between two renderings from which on two characters are one shape: A, Alpha and Cyrillic A; o and O."""

SAME_SHAPE_ACROSS_SPLITS = 0.90
"""Stricter where the characters lie in two splits: a test class must not be a training class drawn a little rounder."""

_CANVAS, _SIZE = 28, 24  # pixels of the renderings that are compared


@dataclass(frozen=True)
class Character:
    """A class of Glyphs.

    Attributes:
        codepoint: of the character.
        name: the class's name, ``script/rest of the Unicode name``, e.g. ``"GREEK/SMALL LETTER OMEGA"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        outlines: its outline in each face that has it, by the name of the face; font units, y up.
    """

    codepoint: int
    name: str
    split: str
    outlines: dict[str, Outline]


def font_file(face: str) -> Path:
    """The file of a face inside matplotlib.

    Raises:
        DataError: if this matplotlib has been stripped of the font.
    """
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise DataError(
            f"matplotlib's font {path} is missing", "install matplotlib from its wheel: pip install matplotlib"
        )
    return path


def choose_characters(progress: Callable[[int, int, str], None] | None = None) -> list[Character]:
    """All base letters of the known scripts, each shape once.

    A letter that looks like an earlier one in any face that both have is left out, whatever its script, so that no
    shape lies in two classes or two splits. Of two the one in more faces stays, else the first by script and code
    point.

    Args:
        progress: called as ``progress(done, total, what)``.
    """
    outlines: dict[int, dict[str, Outline]] = {}
    for number, face in enumerate(FACES):
        if progress is not None:
            progress(number, len(FACES), "reading fonts")
        for codepoint, outline in _letters_of(face):
            outlines.setdefault(codepoint, {})[face] = outline
    if progress is not None:
        progress(len(FACES), len(FACES), "reading fonts")
    scripts = list(SCRIPTS)
    order = sorted(outlines, key=lambda code: (-len(outlines[code]), scripts.index(_script(code)), code))
    chosen = _distinct(order, outlines)
    chosen.sort(key=lambda code: (scripts.index(_script(code)), code))
    return [Character(code, _class_name(code), SCRIPTS[_script(code)], outlines[code]) for code in chosen]


def _letters_of(face: str) -> Iterator[tuple[int, Outline]]:
    """Code point and outline of each letter of a face; never its box for missing characters."""
    from fontTools.ttLib import TTFont

    with _quiet_font_tools(), TTFont(font_file(face)) as font:
        glyphs = font.getGlyphSet()
        names = _tex_codes(font.getGlyphOrder()) if face in TEX_FACES else font.getBestCmap()
        for codepoint, name in sorted(names.items()):
            if name != ".notdef" and _is_base_letter(codepoint):
                outline = _outline(glyphs, name)
                if outline is not None:
                    yield codepoint, outline


@contextmanager
def _quiet_font_tools() -> Iterator[None]:
    """Without fontTools' remarks on the dates in Computer Modern's files."""
    logger = logging.getLogger("fontTools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tex_codes(glyph_names: list[str]) -> dict[int, str]:
    """Code points by Adobe's list of glyph names, e.g. ``Gamma`` -> U+0393."""
    from fontTools import agl

    codes = {}
    for name in glyph_names:
        text = unicodedata.normalize("NFC", agl.toUnicode(name))  # the list has OHM SIGN for Omega
        if len(text) == 1:
            codes[ord(text)] = name
    return codes


def _is_base_letter(codepoint: int) -> bool:
    """A letter of a known script that is not composed of others; raised and modifier letters are not base letters."""
    character = chr(codepoint)
    return (
        unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lo")
        and unicodedata.normalize("NFKD", character) == character
        and _script(codepoint) != ""
    )


@cache
def _script(codepoint: int) -> str:
    name = unicodedata.name(chr(codepoint), "")
    return next((script for script in SCRIPTS if name.startswith(script + " ")), "")


def _class_name(codepoint: int) -> str:
    script = _script(codepoint)
    return f"{script}/{unicodedata.name(chr(codepoint))[len(script) + 1 :]}"


def _outline(glyphs: Any, name: str) -> Outline | None:
    """The outline of a glyph, None where it has no ink."""
    from matplotlib.path import Path as Outline

    pen = _pen_class()(glyphs)
    glyphs[name].draw(pen)
    if not pen.vertices:
        return None
    return Outline(np.array(pen.vertices, dtype=np.float64), pen.codes)


@cache
def _pen_class() -> type:
    """Made on first use, so that importing this module does not import fontTools."""
    from fontTools.pens.basePen import BasePen
    from matplotlib.path import Path as Outline

    class OutlinePen(BasePen):
        """Collects vertices and codes of a matplotlib path."""

        def __init__(self, glyphs: Any) -> None:
            super().__init__(glyphs)
            self.vertices: list[tuple[float, float]] = []
            self.codes: list[int] = []

        def _add(self, code: int, *points: tuple[float, float]) -> None:
            self.vertices += points
            self.codes += [code] * len(points)

        def _moveTo(self, point: tuple[float, float]) -> None:
            self._add(Outline.MOVETO, point)

        def _lineTo(self, point: tuple[float, float]) -> None:
            self._add(Outline.LINETO, point)

        def _qCurveToOne(self, *points: tuple[float, float]) -> None:
            self._add(Outline.CURVE3, *points)

        def _curveToOne(self, *points: tuple[float, float]) -> None:
            self._add(Outline.CURVE4, *points)

        def _closePath(self) -> None:
            self._add(Outline.CLOSEPOLY, self.vertices[-1])

    return OutlinePen


def _distinct(order: list[int], outlines: dict[int, dict[str, Outline]]) -> list[int]:
    """The code points, in this order, that look like no earlier one that was kept."""
    alike = _look_alikes(order, outlines)
    kept: list[int] = []
    taken: set[int] = set()
    for codepoint in order:
        if taken.isdisjoint(alike[codepoint]):
            kept.append(codepoint)
            taken.add(codepoint)
    return kept


def _look_alikes(codes: list[int], outlines: dict[int, dict[str, Outline]]) -> dict[int, set[int]]:
    """For each code point those that look like it in any face that both have."""
    from cml_dist.domains.glyph_images import Canvas, upright

    canvas = Canvas(_CANVAS)
    alike: dict[int, set[int]] = {codepoint: set() for codepoint in codes}
    for face in FACES:
        here = [codepoint for codepoint in codes if face in outlines[codepoint]]
        images = [canvas.draw(outlines[code][face], upright(outlines[code][face], _CANVAS, _SIZE)) for code in here]
        # Products of whole numbers below 2**53 are exact in float64, so that the outcome is the same on any BLAS.
        pixels = np.stack(images).reshape(len(here), -1).astype(np.float64)
        products = pixels @ pixels.T
        lengths = np.sqrt(np.diag(products))
        splits = np.array([SCRIPTS[_script(codepoint)] for codepoint in here])
        limit = np.where(splits[:, None] == splits[None], SAME_SHAPE, SAME_SHAPE_ACROSS_SPLITS)
        for first, second in zip(*np.nonzero(products >= limit * np.outer(lengths, lengths)), strict=True):
            if first != second:
                alike[here[first]].add(here[second])
    return alike
