"""Outlines to 28x28 grey images: an exact, antialiased rasteriser, and the small affine changes of the examples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.path import Path as Outline

IMAGE_SIZE = 28
"""Pixels a side."""

EXAMPLES = 20
"""Examples of each class."""

_SEED = 20406  # of the recipe; the rest of a class's seed is its code point
_GLYPH_SIZE = 20.0  # pixels of the longer side of an unchanged glyph
_ROOM = IMAGE_SIZE - 2.0  # pixels that a changed glyph may span: one stays black on each side
_ROTATION = math.radians(12)
_SHEAR = 0.2
_LOG_SCALE = 0.15
_LOG_ASPECT = 0.12
_SHIFT = 2.0  # pixels

Affine = tuple[float, float, float, float, float, float]
"""``(a, b, c, d, e, f)``: x' = a x + c y + e, y' = b x + d y + f."""


class Canvas:
    """A square of ``size`` pixels on which filled outlines are drawn, white (255) on black (0), by covered area."""

    def __init__(self, size: int) -> None:
        from matplotlib.backends.backend_agg import RendererAgg

        self._renderer = RendererAgg(size, size, 72)
        self._context = self._renderer.new_gc()
        self._context.set_linewidth(0)  # fill only
        self._context.set_snap(False)  # straight strokes stay where they are, between pixels

    def draw(self, outline: Outline, affine: Affine) -> np.ndarray:
        """The outline after the affine change: uint8 ``[size, size]``."""
        from matplotlib.transforms import Affine2D

        self._renderer.clear()
        self._renderer.draw_path(self._context, outline, Affine2D.from_values(*affine), (1.0, 1.0, 1.0))
        return np.asarray(self._renderer.buffer_rgba())[..., 3].copy()


def upright(outline: Outline, canvas: int, size: float) -> Affine:
    """The change that centres an outline on a canvas and makes its longer side ``size`` pixels."""
    scale = size / _longer_side(outline)
    return _centred(outline, (scale, 0.0, 0.0, scale), canvas, (0.0, 0.0))


def examples(outlines: dict[str, Outline], codepoint: int, canvas: Canvas) -> list[tuple[str, np.ndarray]]:
    """The examples of a class, ``EXAMPLES`` pairs of a face's name and an image, uint8 ``[28, 28]``.

    Faces come in turn, in an order and with changes drawn from the code point alone.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([_SEED, codepoint])))
    faces = [list(outlines)[i] for i in rng.permutation(len(outlines))]
    chosen = [faces[number % len(faces)] for number in range(EXAMPLES)]
    return [(face, canvas.draw(outlines[face], _random_change(outlines[face], rng))) for face in chosen]


def _random_change(outline: Outline, rng: np.random.Generator) -> Affine:
    """A small rotation, shear, scaling and shift that keeps the glyph inside the image."""
    turn, shear, scale, aspect, right, up = rng.uniform(-1, 1, size=6).tolist()
    turn, shear = turn * _ROTATION, shear * _SHEAR
    size = _GLYPH_SIZE * math.exp(scale * _LOG_SCALE) / _longer_side(outline)
    wide, high = size * math.exp(aspect * _LOG_ASPECT / 2), size * math.exp(-aspect * _LOG_ASPECT / 2)
    # rotation . shear . stretch; the functions of math, not numpy's, are the same on any processor
    cos, sin = math.cos(turn), math.sin(turn)
    linear = (cos * wide, sin * wide, (cos * shear - sin) * high, (sin * shear + cos) * high)
    span = max(_spans(outline, linear))
    if span > _ROOM:
        linear = tuple(value * _ROOM / span for value in linear)
    shift = [max(0.0, min(_SHIFT, (_ROOM - length) / 2)) for length in _spans(outline, linear)]
    return _centred(outline, linear, IMAGE_SIZE, (right * shift[0], up * shift[1]))


def _longer_side(outline: Outline) -> float:
    return np.ptp(outline.vertices, axis=0).max()


def _moved(outline: Outline, linear: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    x, y = outline.vertices.T
    a, b, c, d = linear
    return a * x + c * y, b * x + d * y


def _spans(outline: Outline, linear: tuple[float, ...]) -> tuple[float, float]:
    """Width and height in pixels; of the control points, which lie hardly outside the curves."""
    x, y = _moved(outline, linear)
    return float(np.ptp(x)), float(np.ptp(y))


def _centred(outline: Outline, linear: tuple[float, ...], canvas: int, shift: tuple[float, float]) -> Affine:
    """The linear change, then the middle of the glyph's box to the middle of the canvas plus ``shift`` pixels."""
    x, y = _moved(outline, linear)
    a, b, c, d = linear
    right, up = (canvas / 2 + s - float(v.min() + v.max()) / 2 for s, v in zip(shift, (x, y), strict=True))
    return a, b, c, d, right, up
