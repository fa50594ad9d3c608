"""What people see: by rich on a terminal, as plain lines elsewhere; and a copy of each line for the logs of the ranks.

Whatever a :class:`Console` says also goes to the logger ``cml_dist``, for the file of
:class:`cml_dist.telemetry.rank_log.RankLog`. Nothing is ever read as markup: names of files and classes are shown as
they are.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NoReturn, TextIO

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from cml_dist.telemetry.live import LiveDisplay, ProgressView, TrainingView
from cml_dist.telemetry.summary import Best, TrainingSummary
from cml_dist.telemetry.table import fitted
from cml_dist.telemetry.text import MISSING, folded, interval, line, measured, printable, score, score_label

LOG = logging.getLogger("cml_dist")
LOG.setLevel(logging.INFO)
LOG.addHandler(logging.NullHandler())  # else logging shows warnings a second time where no rank's log is open

PLAIN_WIDTH = 240
"""Columns of tables without a terminal, where COLUMNS is not set; lines are not folded there."""


@dataclass(frozen=True)
class ResultRow:
    """One line of results: a learner (or a floor to compare with) and its score."""

    learner: str
    mean: float | None
    ci95: float | None = None
    episodes: int | None = None


class Console:
    """The terminal of a run.

    Args:
        file: where to write; None: standard output (errors and warnings: standard error).
        width: columns; None: those of the terminal.
        interactive: live displays; None: where the output is a terminal that can move its cursor.
        quiet: nothing on the screen, only in the log; ranks other than 0.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        width: int | None = None,
        interactive: bool | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if interactive is None:
            # Not rich's own answer: FORCE_COLOR asks for colours in a log, not for a moving cursor.
            interactive = (file or sys.stdout).isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
        self.interactive = interactive and not quiet
        self._clock = clock
        self._quiet = quiet
        asked = self.interactive or os.environ.get("COLUMNS", "").isdecimal()  # rich reads it
        self._width = width if width is not None or asked else PLAIN_WIDTH
        self._out = self._rich(file)
        self._err = self._out if file is not None else self._rich(None, stderr=True)
        self._live: LiveDisplay | None = None
        self._summary: TrainingSummary | None = None

    # ------------------------------------------------------------------ lines

    def note(self, message: object) -> None:
        """One line."""
        self.say(Text(printable(message)))

    def loading(self) -> None:
        """One line before PyTorch is imported, which takes seconds, or a minute from a file system of a network."""
        if "torch" not in sys.modules:
            self.note("Loading PyTorch")

    def warn(self, message: object) -> None:
        """One line that asks for attention, on standard error."""
        self._complain(logging.WARNING, "yellow", printable(message))

    def error(self, what: object, remedy: object = "") -> None:
        """One line: what is wrong, and what to do; on standard error."""
        self._complain(logging.ERROR, "bold red", printable(f"{what}; {remedy}" if remedy else what))

    def validation(
        self, step: int, rows: Sequence[ResultRow], *, score_name: str = "accuracy", best: Best | None = None
    ) -> None:
        """One line with the scores of the learners after ``step``; ``best`` is (step, score) of the best so far."""
        shown = [f"{row.learner} {measured(score_name, row.mean, row.ci95)}" for row in rows]
        is_best = best is not None and best[0] == step
        if best is not None:
            shown.append("best so far" if is_best else f"best {score(score_name, best[1])} at step {best[0]}")
            if self._summary is not None:
                self._summary.best = best
        self.say(Text(printable("  ".join([f"step {step}  validation", *shown])), style="green" if is_best else ""))

    def command(self, says: str, command: str) -> None:
        """What to type next, in words and itself: never folded, since it is to be copied."""
        whole = f"{says} {command}"
        if self.interactive and cell_len(whole) > self._out.width:
            self.note(says)
            whole = command
        self.say(Text(printable(whole)), fold=False)

    def say(self, line: Text, on_screen: bool = True, *, fold: bool = True, hang: int = 0) -> None:
        """One line with its style, on the screen and in the log; or in the log alone.

        Args:
            fold: a terminal would break it inside a word; a log has one line of it.
            hang: columns that what is folded is moved to the right by.
        """
        if on_screen:
            shown = folded(line.plain, self._out.width, hang) if fold and self.interactive else line.plain
            self._out.print(Text(shown, line.style, spans=line.spans), soft_wrap=True)
            self._out.file.flush()
        LOG.info("%s", line.plain)

    # ------------------------------------------------------------------ blocks

    def header(self, title: str, rows: Mapping[str, object]) -> None:
        """The resolved plan: a panel on a terminal, ``name: value`` lines elsewhere."""
        shown = {line(name): line(value) for name, value in rows.items()}
        if self.interactive:
            grid = Table.grid(Column(style="cyan", no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
            room = self._out.width - max(map(len, shown), default=0) - 6
            for name, value in shown.items():
                grid.add_row(Text(name), Text(folded(value, room)))
            heading = Text(f" {printable(title)} ", style="bold")
            self._out.print(Panel(grid, title=heading, title_align="left", border_style="dim", expand=False))
        for row in (printable(title), *(f"  {name}: {value}" for name, value in shown.items())):
            self.say(Text(row), on_screen=not self.interactive)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, least: Sequence[str] = ()
    ) -> None:
        """A table; columns that hold nothing but numbers stand to the right.

        Args:
            least: the columns that are left out where the screen is too narrow for all, the least worth first.
        """
        shown, cells = [printable(name) for name in columns], [[_cell(cell) for cell in row] for row in rows]
        if title:  # on a line of its own: as the table's, it would fold to the table's width
            self.say(Text(printable(title), style="bold"))
        table, left_out = fitted(shown, cells, self._out.width, least)
        self._out.print(table)
        if left_out:
            self._out.print(Text(f"Left out, for {self._out.width} columns: {', '.join(left_out)}", style="dim"))
        self._out.print()
        plain = io.StringIO()
        record = RichConsole(file=plain, width=PLAIN_WIDTH, color_system=None, force_jupyter=False)
        record.print(fitted(shown, cells, PLAIN_WIDTH)[0])
        for row in filter(str.strip, plain.getvalue().splitlines()):
            LOG.info("%s", row.rstrip())

    def results(self, rows: Sequence[ResultRow], *, title: str = "Test", score_name: str = "accuracy") -> None:
        """The final table: learner, mean score, 95 % interval, episodes (none for chance, which is not measured)."""
        self._out.print()
        self.table(
            title,
            ("learner", score_label(score_name), "95 % interval", "episodes"),
            [(r.learner, score(score_name, r.mean, 2), interval(score_name, r.ci95, 2), r.episodes) for r in rows],
            least=("episodes",),
        )

    def clear(self) -> None:
        """An empty screen, where there is one, for a block that is shown again and again."""
        if self.interactive:
            self._out.clear()

    # ------------------------------------------------------------------ running displays

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[ProgressView]:
        """A running count that leaves nothing behind on a terminal; ``total`` is None where nobody knows."""
        with self._display(transient=True) as live:
            view = ProgressView(self.say, self._clock, live, printable(description), total)
            try:
                yield view
            finally:
                view.close()

    @contextmanager
    def training(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        score_name: str = "accuracy",
        log_every: int = 50,
        best: Best | None = None,
        method: str = "",
    ) -> Iterator[TrainingView]:
        """The training itself, see :class:`TrainingSummary`: call ``step(metrics)`` after each meta-step.

        ``method``: what is trained, by the name that tables have. Without a terminal it is one line in ``log_every``
        steps. Later ``best`` come through :meth:`validation`.
        """
        self._summary = TrainingSummary(total_steps, start_step, log_every, score_name, best, self._clock)
        try:
            with self._display(transient=False) as live:
                yield TrainingView(self.say, live, self._summary, printable(f"training {method}".rstrip()))
                if live is not None:
                    live.refresh()  # what stays on the screen is the last state
        finally:
            self._summary = None

    @contextmanager
    def _display(self, transient: bool) -> Iterator[LiveDisplay | None]:
        """The one live display, None without a terminal; a count inside the training is one more line of it."""
        if not self.interactive or self._live is not None:
            yield self._live
            return
        with LiveDisplay(self._out, transient) as live:
            self._live = live
            try:
                yield live
            finally:
                self._live = None

    # ------------------------------------------------------------------ inside

    def _rich(self, file: TextIO | None, stderr: bool = False) -> RichConsole:
        stream = file or (sys.stderr if stderr else sys.stdout)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows "?" for "±", and goes on
        return _Rich(
            file=file,
            stderr=stderr,
            quiet=self._quiet,
            width=self._width,
            force_terminal=True if self.interactive and not stderr else None,
            force_interactive=self.interactive,
            highlight=False,
            markup=False,
            emoji=False,
            force_jupyter=False,  # there it would make each line an object of its own
        )

    def _complain(self, level: int, style: str, message: str) -> None:
        screen = self._err if self._live is None else self._out  # a live display is moved out of the way
        name = f"{logging.getLevelName(level).lower()}:"
        said = f"{name} {message}"
        said = Text(folded(said, screen.width) if self.interactive else said)
        said.stylize(style, 0, len(name))
        screen.print(said, soft_wrap=True)
        screen.file.flush()
        LOG.log(level, "%s", message)


class _Rich(RichConsole):
    def on_broken_pipe(self) -> NoReturn:
        raise  # rich would end the process, with nothing told to the other ranks


@contextmanager
def preparing(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Yields ``progress(done, total, what)``, which shows a count for each new ``what`` until the block ends."""
    views: dict[str, ProgressView] = {}
    with ExitStack() as stack:

        def progress(done: int, total: int, what: str) -> None:
            if what not in views:
                views[what] = stack.enter_context(console.progress(what, total))
            views[what].update(done)

        yield progress


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return MISSING if value is None else line(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
