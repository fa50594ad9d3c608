"""Which characters are classes of Glyphs, and their outlines: read from the fonts that ship inside matplotlib."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cml_dist.data.base import Progress
from cml_dist.data.glyph_images import Canvas, upright
from cml_dist.errors import DataError

if TYPE_CHECKING:
    from matplotlib.path import Path as Outline

_TRAIN = ("LATIN", "GREEK", "CYRILLIC", "COPTIC", "OLD ITALIC", "LISU", "CANADIAN SYLLABICS", "OGHAM")
_VAL = ("ARMENIAN", "HEBREW", "NKO", "LAO")
_TEST = ("GEORGIAN", "ARABIC", "TIFINAGH")
SCRIPTS = dict.fromkeys(_TRAIN, "train") | dict.fromkeys(_VAL, "val") | dict.fromkeys(_TEST, "test")
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


class Character(NamedTuple):
    """A class of Glyphs: a character, and its outline in each face that has it (font units, y up)."""

    codepoint: int
    name: str  # script/rest of the Unicode name, e.g. "GREEK/SMALL LETTER OMEGA"
    split: str
    outlines: dict[str, Outline]


def font_file(face: str) -> Path:
    """The file of a face inside matplotlib.

    Raises:
        DataError: if this matplotlib has been stripped of the font, or is older than it (cmti10 came with 3.11).
    """
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        remedy = "install a wheel that has it: pip install --force-reinstall 'matplotlib>=3.11'"
        raise DataError(f"matplotlib's font {path} is missing", remedy)
    return path


def choose_characters(progress: Progress | None = None) -> list[Character]:
    """All base letters of the known scripts, each shape once.

    A letter that looks like an earlier one in any face that both have is left out, whatever its script, so that no
    shape lies in two classes or two splits. Of two the one in more faces stays, else the first by script and code
    point.
    """
    outlines: dict[int, dict[str, Outline]] = {}
    for number, face in enumerate(FACES, start=1):
        for codepoint, outline in _letters_of(face):
            outlines.setdefault(codepoint, {})[face] = outline
        if progress is not None:
            progress(number, len(FACES), "reading fonts")
    place = {code: (list(SCRIPTS).index(_script(code)), code) for code in outlines}
    order = sorted(outlines, key=lambda code: (-len(outlines[code]), *place[code]))
    alike = _look_alikes(order, outlines)
    chosen: list[int] = []
    for code in order:
        if alike[code].isdisjoint(chosen):
            chosen.append(code)
    chosen.sort(key=place.get)
    names = {code: unicodedata.name(chr(code)).replace(_script(code) + " ", _script(code) + "/", 1) for code in chosen}
    return [Character(code, names[code], SCRIPTS[_script(code)], outlines[code]) for code in chosen]


def _letters_of(face: str) -> Iterator[tuple[int, Outline]]:
    """Code point and outline of each letter of a face; never its box for missing characters."""
    from fontTools.ttLib import TTFont

    # Computer Modern's files have dates that it remarks on.
    logging.getLogger("fontTools.ttLib.tables._h_e_a_d").setLevel(logging.ERROR)
    with TTFont(font_file(face)) as font:
        glyphs = font.getGlyphSet()
        names = _tex_codes(font.getGlyphOrder()) if face in TEX_FACES else font.getBestCmap()
        for codepoint, name in sorted(names.items()):
            outline = _outline(glyphs, name) if name != ".notdef" and _is_base_letter(codepoint) else None
            if outline is not None:
                yield codepoint, outline


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


def _outline(glyphs: Any, name: str) -> Outline | None:
    """The outline of a glyph, None where it has no ink."""
    from fontTools.pens.basePen import decomposeQuadraticSegment
    from fontTools.pens.recordingPen import DecomposingRecordingPen
    from matplotlib.path import Path as Outline

    pen = DecomposingRecordingPen(glyphs)
    glyphs[name].draw(pen)
    vertices: list[tuple[float, float]] = []
    codes: list[int] = []
    for operator, points in pen.value:
        if operator == "qCurveTo":
            if points[-1] is None:  # no point lies on the curve: it starts between its last and its first
                start = tuple(np.mean((points[-2], points[0]), axis=0))
                vertices, codes = [*vertices, start], [*codes, Outline.MOVETO]
                points = (*points[:-1], start)
            points = [point for curve in decomposeQuadraticSegment(points) for point in curve]
        code = {"moveTo": Outline.MOVETO, "lineTo": Outline.LINETO, "qCurveTo": Outline.CURVE3}.get(operator)
        if operator == "closePath":
            code, points = Outline.CLOSEPOLY, [vertices[-1]]
        vertices += points
        codes += [code] * len(points)
    return Outline(np.array(vertices, dtype=np.float64), codes) if vertices else None


def _look_alikes(codes: list[int], outlines: dict[int, dict[str, Outline]]) -> dict[int, set[int]]:
    """For each code point those that look like it in any face that both have, itself among them."""
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
            alike[here[first]].add(here[second])
    return alike
