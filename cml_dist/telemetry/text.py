"""Numbers and names as people read them; no terminal, no rich."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence

MISSING = "-"

_TIED = re.compile(r"(?<=±) | (?=%)|(?<=\d) (?=(?:s|ms|min|h|px|MiB|GiB|episodes/s)\b)")
"""Spaces where no line ends."""


def printable(value: object) -> str:
    """``str(value)`` without control characters and lone surrogates, which file names may hold."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in str(value))


def line(value: object) -> str:
    """:func:`printable` on one line, for a name or a reason that was read from a file."""
    return printable(value).replace("\n", " ")


def folded(text: str, width: int, hang: int = 0) -> str:
    """Lines of at most ``width`` columns, broken between words alone, and not between a number and its unit.

    A word that is too long stays whole, so that it can be copied. All lines but the first begin at column ``hang``.
    """
    lines = _TIED.sub("\N{NO-BREAK SPACE}", text).split("\n")  # for textwrap it is no space
    wrap = textwrap.TextWrapper(width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrap.fill, lines)).replace("\N{NO-BREAK SPACE}", " ")


def markdown(value: object) -> str:
    """:func:`line` as plain text in Markdown, also where HTML in it counts: no link, image, element or formula."""
    return re.sub(r"([\\`*_\[\]<>&|!~$@]|:(?=//)|(?<=www)\.)", r"\\\1", line(value), flags=re.IGNORECASE)


def duration(seconds: float | None) -> str:
    """Seconds as ``35 s``, ``2 min 20 s`` or ``1 h 2 min``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    minutes, whole = divmod(max(0, round(seconds)), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min {whole} s" if minutes else f"{whole} s"


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, e.g. ``1.234``, ``0.5000`` or ``2.500e-07``."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:#.{digits}g}".rstrip(".")


def amount(value: float) -> str:
    """A number of 0 or more with three significant digits or more, e.g. ``1,234``, ``0.0123``, ``0``."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def shape_in_words(sizes: Sequence[int]) -> str:
    """Of one input: images (channels, height, width) as ``32x24 px, 3 channels``, anything else as ``5x4``."""
    if len(sizes) != 3:
        return "x".join(map(str, sizes))
    channels, height, width = sizes
    return f"{width}x{height} px, {channels} channel{'s' * (channels != 1)}"


def score_label(name: str) -> str:
    """How a score is called in tables."""
    return "MSE" if name == "mse" else name


def score(name: str, value: float | None, decimals: int = 1) -> str:
    """A score: accuracy (a fraction) in per cent, everything else as a number."""
    if name != "accuracy":
        return number(value)
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.{decimals}f} %"


def interval(name: str, half_width: float | None, decimals: int = 1) -> str:
    """The half width of an interval of a score, e.g. ``± 0.62 %``."""
    shown = score(name, half_width, decimals)
    return shown if shown == MISSING else f"± {shown}"


def measured(name: str, mean: float | None, ci95: float | None, decimals: int = 1) -> str:
    """A score with its interval, if there is one, e.g. ``51.2 % ± 0.6 %``."""
    shown = score(name, mean, decimals)
    return shown if ci95 is None else f"{shown} {interval(name, ci95, decimals)}"
