"""A table for so many columns of a screen: cells fold between words, and columns give way in order of worth."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

COMFORT = 16
"""A column of words is at least this wide, unless it holds less."""

_NUMBER = re.compile(r"(± )?[-+]?[\d.,:]+(e[-+]\d+)?( %)?|-|")
_GAP = 2


def fitted(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, least: Sequence[str] = ()
) -> tuple[Table, list[str]]:
    """The table in ``width`` columns, and which of ``least`` (the first has the least worth) had to be left out."""
    cells = {name: [row[n] for row in rows] for n, name in enumerate(columns)}
    numbers = {name for name, column in cells.items() if column and all(map(_NUMBER.fullmatch, column))}
    needs, widths = {}, {}
    for name, column in cells.items():
        widths[name] = max(map(cell_len, [name, *column]))
        longest = max(cell_len(word) for cell in [name, *column] for word in cell.split(" "))
        needs[name] = widths[name] if name in numbers else max(longest, min(widths[name], COMFORT))
    left_out: list[str] = []

    def room(kept: dict[str, int]) -> int:
        return width - _GAP * (len(kept) - 1) - sum(kept.values())

    for name in least:
        if room(needs) >= 0:
            break
        left_out.append(name)
        del needs[name], widths[name]
    while room(widths) < 0:  # the widest folds first; inside of words only where nothing else is left
        widest = max(widths, key=lambda name: (widths[name] > needs[name], widths[name]))
        widths[widest] -= 1
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for name, wide in widths.items():
        justify = "right" if name in numbers else "left"
        table.add_column(Text(name), justify=justify, overflow="fold", width=wide)
    for row in zip(*(cells[name] for name in widths), strict=True):
        table.add_row(*map(Text, row))
    return table, left_out
