"""What people see: live on a terminal, plain lines elsewhere, nothing on ranks other than 0. The only importer of rich.

Nothing is ever read as markup: names of files and classes are shown as they are.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column, Table
from rich.text import Text

from cml_dist.telemetry import text
from cml_dist.telemetry.metrics import StepMetrics
from cml_dist.telemetry.summary import TrainingSummary

QUIET_S = 10.0
"""Without a terminal: seconds between two lines of a progress, which says nothing at all if it ends before."""

SILENT_S = 60.0
"""Without a terminal: seconds after which training says something even if ``log_every`` steps are not done."""

MAX_WIDTH = 100
"""Columns that live displays use at most."""

VERDICT_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "fault": "bold red"}


@dataclass(frozen=True)
class ResultRow:
    """One line of results: a learner (or a floor to compare with) and its score."""

    learner: str
    mean: float | None
    ci95: float | None = None
    episodes: int | None = None


class Row(Protocol):
    """A line of findings, see :meth:`Console.findings`."""

    @property
    def check(self) -> str: ...

    @property
    def verdict(self) -> str: ...

    @property
    def value(self) -> str: ...

    @property
    def remedy(self) -> str: ...

    @property
    def who(self) -> str: ...


class ProgressView:
    """A running count; this one shows nothing."""

    def update(self, done: int, **fields: object) -> None:
        """``done`` of the total are done; ``fields`` are shown beside it (``accuracy`` as a fraction)."""


class TrainingView:
    """A running training; this one shows nothing."""

    def step(self, metrics: StepMetrics) -> None:
        """The next meta-step is done."""


class Console:
    """The terminal of a run.

    Args:
        file: where to write; None: standard output (errors and warnings: standard error).
        width: columns; None: those of the terminal.
        interactive: live displays; None: where the output is a terminal that can move its cursor.
        clock: seconds from a monotonic clock.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        width: int | None = None,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = file or sys.stdout
        if interactive is None:
            # Not rich's own answer: FORCE_COLOR asks for colours in a log, not for a moving cursor.
            interactive = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
        self.interactive = interactive
        self._clock = clock
        self._file = file
        # Lines of a log are not folded; a table takes what it needs.
        self._width = width if width is not None or interactive else 240
        self._out = self._rich(file)
        self._live: _Live | None = None
        self._summary: TrainingSummary | None = None

    # ------------------------------------------------------------------ lines

    def note(self, message: object) -> None:
        """One line."""
        self._say(Text(text.printable(message)))

    def warn(self, message: object) -> None:
        """One line that asks for attention, on standard error."""
        self._complain("warning", "yellow", text.printable(message))

    def error(self, what: object, remedy: object = "") -> None:
        """One line: what is wrong, and what to do; on standard error."""
        self._complain("error", "bold red", text.printable(f"{what}; {remedy}" if remedy else what))

    def validation(
        self,
        step: int,
        rows: Sequence[ResultRow],
        *,
        score_name: str = "accuracy",
        best: tuple[int, float] | None = None,
    ) -> None:
        """One line with the scores of the learners after ``step``; ``best`` is (step, score) of the best so far."""
        line = Text(f"step {step}  validation", style="bold")
        for row in rows:
            line.append(f"  {text.printable(row.learner)} ", style="not bold")
            line.append(text.score(score_name, row.mean))
            if row.ci95 is not None:
                line.append(f" {text.interval(score_name, row.ci95)}", style="not bold")
        if best is not None:
            if best[0] == step:
                line.append("  best so far", style="green")
            else:
                line.append(f"  best {text.score(score_name, best[1])} at step {best[0]}", style="not bold")
            if self._summary is not None:
                self._summary.best = best
        self._say(line)

    # ------------------------------------------------------------------ blocks

    def header(self, title: str, rows: Mapping[str, object]) -> None:
        """The resolved plan: a panel on a terminal, ``name: value`` lines elsewhere."""
        if not self.interactive:
            self._say(Text(text.printable(title)))
            for name, value in rows.items():
                self._say(Text(f"  {text.printable(name)}: {text.printable(value)}"))
            return
        grid = Table.grid(Column(style="cyan", no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
        for name, value in rows.items():
            grid.add_row(Text(text.printable(name)), Text(text.printable(value)))
        heading = Text(f" {text.printable(title)} ", style="bold")
        self._out.print(Panel(grid, title=heading, title_align="left", border_style="dim", expand=False))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; columns that hold nothing but numbers stand to the right."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(columns):
            cells = [row[index] for row in rows]
            right = bool(cells) and all(isinstance(cell, (int, float)) for cell in cells)
            table.add_column(Text(text.printable(name)), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(cell)) for cell in row))
        self._show(title, table)

    def results(self, rows: Sequence[ResultRow], *, title: str = "Test", score_name: str = "accuracy") -> None:
        """The final table: learner, mean score, 95 % interval, episodes."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("learner", overflow="fold")
        name = "MSE" if score_name == "mse" else score_name
        for column in (name, "95 % interval", "episodes"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            # A row without episodes is a reference (chance), not a measurement.
            style = "dim" if row.episodes is None else ""
            table.add_row(
                Text(text.printable(row.learner)),
                Text(text.score(score_name, row.mean, 2), style="" if style else "bold"),
                Text(text.interval(score_name, row.ci95, 2)),
                Text(text.MISSING if row.episodes is None else f"{row.episodes:,}"),
                style=style,
            )
        self._out.print()
        self._show(title, table)

    def findings(self, groups: Mapping[str, Sequence[Row]]) -> None:
        """What was looked at, under headings: verdict, name, what was found, and below it what to do.

        A line a finding where there is no terminal, for grep.
        """
        width = max((len(row.check) for rows in groups.values() for row in rows), default=0)
        for group, rows in groups.items():
            self._say(Text(text.printable(group), style="bold"))
            grid = Table.grid(
                Column(no_wrap=True, min_width=9),
                Column(no_wrap=True, min_width=width),
                Column(overflow="fold"),
                padding=(0, 2, 0, 0),
            )
            for row in rows:
                found = text.printable(f"{row.who}: {row.value}" if row.who else row.value)
                remedy = text.printable(row.remedy)
                if not self.interactive:
                    line = f"  {row.verdict:<7}  {text.printable(row.check)}: {found}"
                    self._say(Text(f"{line}; {remedy}" if remedy else line))
                    continue
                style = VERDICT_STYLES[row.verdict]
                grid.add_row(Text(f"  {row.verdict}", style=style), Text(text.printable(row.check)), Text(found))
                if remedy:
                    grid.add_row("", "", Text(f"-> {remedy}", style="" if row.verdict == "note" else style))
            if self.interactive:
                self._out.print(Constrain(grid, MAX_WIDTH))

    def verdict(self, said: str, ready: bool, repairs: Sequence[tuple[str, str]]) -> None:
        """The last word, with a numbered list of (what is wrong, what to do)."""
        self._out.print()
        self._say(Text(text.printable(said), style="bold green" if ready else "bold red"))
        for number, (what, remedy) in enumerate(repairs, 1):
            self._say(Text(text.printable(f"  {number}. {what}" + (f"; {remedy}" if remedy else ""))))

    # ------------------------------------------------------------------ running displays

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[ProgressView]:
        """A running count (data preparation, evaluation, packing) that leaves nothing behind on a terminal.

        Args:
            description: a word or two, e.g. ``"validation"``.
            total: what there is to do; None where nobody knows.
        """
        description = text.printable(description)
        if not self.interactive:
            plain = _PlainProgress(self._say, self._clock, description, total)
            yield plain
            plain.close()
            return
        with self._display() as live:
            task = live.add_task(description, total=total, note="")
            try:
                yield _LiveProgress(live, task)
            finally:
                live.remove_task(task)

    @contextmanager
    def training(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        score_name: str = "accuracy",
        log_every: int = 50,
        best: tuple[int, float] | None = None,
    ) -> Iterator[TrainingView]:
        """The training itself: call ``step(metrics)`` after each meta-step.

        Args:
            total_steps: meta-steps of the whole run.
            start_step: the last step done before this session.
            score_name: ``"accuracy"`` or ``"mse"``.
            log_every: losses and scores are means over so many steps; without a terminal, one line in so many steps.
            best: (step, score) of the best validation so far; later ones come through :meth:`validation`.
        """
        summary = TrainingSummary(total_steps, start_step, log_every, score_name, best, self._clock)
        self._summary = summary
        try:
            if not self.interactive:
                yield _PlainTraining(self._say, summary, log_every)
                return
            with self._display() as live:
                task = live.add_task("meta-training", total=total_steps, completed=start_step, note="", summary=summary)
                live.summary = summary
                yield _LiveTraining(live, task, summary)
                # What stays on the screen is the last state.
                live.refresh()
        finally:
            self._summary = None

    # ------------------------------------------------------------------ inside

    @contextmanager
    def _display(self) -> Iterator[_Live]:
        """The one live display; a count inside the training is one more line of it."""
        if self._live is not None:
            yield self._live
            return
        with _Live(self._out) as live:
            self._live = live
            try:
                yield live
            finally:
                self._live = None

    def _rich(self, file: TextIO | None, stderr: bool = False) -> RichConsole:
        stream = file or (sys.stderr if stderr else sys.stdout)
        if not (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf") and hasattr(
            stream, "reconfigure"
        ):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows "?" for "±", and goes on
        return RichConsole(
            file=file,
            stderr=stderr and file is None,
            width=self._width,
            force_terminal=True if self.interactive and not stderr else None,
            force_interactive=self.interactive,
            highlight=False,
            markup=False,
            emoji=False,
        )

    def _show(self, title: str, table: Table) -> None:
        """A table under its title, which has a line of its own: as the table's, it would fold to the table's width."""
        if title:
            self._say(Text(text.printable(title), style="bold"))
        self._out.print(table)

    def _say(self, line: Text) -> None:
        self._out.print(line, soft_wrap=True)
        self._out.file.flush()

    def _complain(self, label: str, style: str, message: str) -> None:
        err = self._out if self._file is not None or self._live is not None else self._rich(None, stderr=True)
        err.print(Text.assemble((f"{label}:", style), " ", message), soft_wrap=True)
        err.file.flush()


class NullConsole(Console):
    """The console of ranks other than 0: the same calls, no output."""

    def __init__(self) -> None:
        self.interactive = False

    def note(self, message: object) -> None: ...

    def warn(self, message: object) -> None: ...

    def error(self, what: object, remedy: object = "") -> None: ...

    def validation(
        self,
        step: int,
        rows: Sequence[ResultRow],
        *,
        score_name: str = "accuracy",
        best: tuple[int, float] | None = None,
    ) -> None: ...

    def header(self, title: str, rows: Mapping[str, object]) -> None: ...

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None: ...

    def findings(self, groups: Mapping[str, Sequence[Row]]) -> None: ...

    def verdict(self, said: str, ready: bool, repairs: Sequence[tuple[str, str]]) -> None: ...

    def results(self, rows: Sequence[ResultRow], *, title: str = "Test", score_name: str = "accuracy") -> None: ...

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[ProgressView]:
        yield ProgressView()

    @contextmanager
    def training(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        score_name: str = "accuracy",
        log_every: int = 50,
        best: tuple[int, float] | None = None,
    ) -> Iterator[TrainingView]:
        yield TrainingView()


class BothConsole(Console):
    """Says everything to two consoles: the screen, and the log of this rank."""

    def __init__(self, screen: Console, log: Console) -> None:
        self.interactive = screen.interactive
        self._both = (screen, log)

    def note(self, message: object) -> None:
        for console in self._both:
            console.note(message)

    def warn(self, message: object) -> None:
        for console in self._both:
            console.warn(message)

    def error(self, what: object, remedy: object = "") -> None:
        for console in self._both:
            console.error(what, remedy)

    def validation(
        self,
        step: int,
        rows: Sequence[ResultRow],
        *,
        score_name: str = "accuracy",
        best: tuple[int, float] | None = None,
    ) -> None:
        for console in self._both:
            console.validation(step, rows, score_name=score_name, best=best)

    def header(self, title: str, rows: Mapping[str, object]) -> None:
        for console in self._both:
            console.header(title, rows)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        for console in self._both:
            console.table(title, columns, rows)

    def findings(self, groups: Mapping[str, Sequence[Row]]) -> None:
        for console in self._both:
            console.findings(groups)

    def verdict(self, said: str, ready: bool, repairs: Sequence[tuple[str, str]]) -> None:
        for console in self._both:
            console.verdict(said, ready, repairs)

    def results(self, rows: Sequence[ResultRow], *, title: str = "Test", score_name: str = "accuracy") -> None:
        for console in self._both:
            console.results(rows, title=title, score_name=score_name)

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[ProgressView]:
        with self._both[0].progress(description, total) as one, self._both[1].progress(description, total) as other:
            yield _BothProgress((one, other))

    @contextmanager
    def training(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        score_name: str = "accuracy",
        log_every: int = 50,
        best: tuple[int, float] | None = None,
    ) -> Iterator[TrainingView]:
        settings: dict[str, Any] = {"score_name": score_name, "log_every": log_every, "best": best}
        screen, log = (console.training(total_steps, start_step, **settings) for console in self._both)
        with screen as one, log as other:
            yield _BothTraining((one, other))


class _BothProgress(ProgressView):
    def __init__(self, views: tuple[ProgressView, ProgressView]) -> None:
        self._views = views

    def update(self, done: int, **fields: object) -> None:
        for view in self._views:
            view.update(done, **fields)


class _BothTraining(TrainingView):
    def __init__(self, views: tuple[TrainingView, TrainingView]) -> None:
        self._views = views

    def step(self, metrics: StepMetrics) -> None:
        for view in self._views:
            view.step(metrics)


def console_for(rank: int) -> Console:
    """The console of a process: a real one on rank 0, a silent one elsewhere."""
    return Console() if rank == 0 else NullConsole()


@contextmanager
def redrawn(console: Console) -> Iterator[Callable[[Callable[[Console], None]], None]]:
    """Yields ``show(draw)``: what ``draw(console)`` prints takes the place of what it printed before.

    Without a terminal each comes under the one before.
    """
    if not console.interactive:
        yield lambda draw: draw(console)
        return
    screen = console._out
    with Live(console=screen, auto_refresh=False, vertical_overflow="crop") as live:

        def show(draw: Callable[[Console], None]) -> None:
            page = io.StringIO()
            draw(Console(page, width=screen.width, interactive=True))
            live.update(Text.from_ansi(page.getvalue()), refresh=True)

        yield show


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return text.MISSING if value is None else text.printable(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _fields(fields: Mapping[str, object]) -> str:
    """Fields beside a count, e.g. ``accuracy 51.2 %``."""
    shown = []
    for name, value in fields.items():
        if isinstance(value, float):
            value = text.score(name, value)
        shown.append(f"{name} {text.printable(value)}")
    return "  ".join(shown)


# ---------------------------------------------------------------------- without a terminal


class _PlainProgress(ProgressView):
    def __init__(
        self, say: Callable[[Text], None], clock: Callable[[], float], description: str, total: int | None
    ) -> None:
        self._say, self._clock, self._description, self._total = say, clock, description, total
        self._last = clock()
        self._line: str | None = None
        self._spoke = False

    def update(self, done: int, **fields: object) -> None:
        of = "" if self._total is None else f"/{self._total}"
        self._line = "  ".join(filter(None, [f"{self._description} {done}{of}", _fields(fields)]))
        if self._clock() - self._last >= QUIET_S:
            self._flush()

    def close(self) -> None:
        """The last line, if lines were shown at all."""
        if self._spoke:
            self._flush()

    def _flush(self) -> None:
        if self._line is not None:
            self._say(Text(self._line))
            self._line, self._spoke, self._last = None, True, self._clock()


class _PlainTraining(TrainingView):
    def __init__(self, say: Callable[[Text], None], summary: TrainingSummary, log_every: int) -> None:
        self._say, self._summary, self._log_every = say, summary, log_every
        self._last = summary.clock()

    def step(self, metrics: StepMetrics) -> None:
        summary = self._summary
        summary.add(metrics)
        due = metrics.step % self._log_every == 0 or metrics.step == summary.total_steps
        if due or summary.clock() - self._last >= SILENT_S:
            self._last = summary.clock()
            self._say(Text(summary.line()))


# ---------------------------------------------------------------------- on a terminal


class _Count(ProgressColumn):
    """``620/1500  41 %``."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(f"{task.completed:,.0f}")
        return Text(f"{task.completed:.0f}/{task.total:.0f} {task.percentage:3.0f} %")


class _Times(ProgressColumn):
    """``1:12 left 1:44``."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        summary: TrainingSummary | None = task.fields.get("summary")
        if summary is not None:
            elapsed, left = summary.elapsed_s, summary.left_s
        else:
            elapsed = task.elapsed or 0.0
            left = elapsed / task.completed * (task.total - task.completed) if task.total and task.completed else None
        return Text(f"{text.duration(elapsed)} left {text.duration(left)}", style="cyan")


class _Note(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], overflow="ellipsis")


class _Live(Progress):
    """Bars, and under them the state of the training."""

    def __init__(self, console: RichConsole) -> None:
        self.summary: TrainingSummary | None = None
        super().__init__(
            _Name(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            _Count(table_column=Column(no_wrap=True, justify="right")),
            _Times(table_column=Column(no_wrap=True)),
            _Note(table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            refresh_per_second=4,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        yield Constrain(self.make_tasks_table(self.tasks), MAX_WIDTH)
        if self.summary is not None:
            yield _state(self.summary)


class _Name(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.description)


class _LiveProgress(ProgressView):
    def __init__(self, live: _Live, task: TaskID) -> None:
        self._live, self._task = live, task

    def update(self, done: int, **fields: object) -> None:
        self._live.update(self._task, completed=done, note=_fields(fields))


class _LiveTraining(TrainingView):
    def __init__(self, live: _Live, task: TaskID, summary: TrainingSummary) -> None:
        self._live, self._task, self._summary = live, task, summary

    def step(self, metrics: StepMetrics) -> None:
        self._summary.add(metrics)
        self._live.update(self._task, completed=metrics.step)


def _state(summary: TrainingSummary) -> RenderableType:
    """Losses and scores of both learners, and beside them rate, gradient and best validation."""
    score_name = "MSE" if summary.score_name == "mse" else summary.score_name
    grid = Table.grid(
        Column(no_wrap=True, min_width=18),
        Column(justify="right", no_wrap=True, min_width=8),
        Column(justify="right", no_wrap=True, min_width=9),
        Column(no_wrap=True, overflow="ellipsis"),
        padding=(0, 3, 0, 0),
    )
    grid.add_row(f"  mean of {summary.window} steps", "loss", score_name, f"best {summary.best_text()}", style="dim")
    facts = _facts(summary)

    def row(name: str, loss: str, score: str, fact: str) -> None:
        shown = text.score(summary.score_name, summary.mean(score)) if score else ""
        grid.add_row(f"  {name}", text.number(summary.mean(loss)), Text(shown, style="bold"), Text(fact, style="dim"))

    row("meta-learner", "outer_loss", "score", facts[0])
    if summary.mean("colearner_loss") is not None:
        row("co-learner", "colearner_loss", "colearner_score", facts[1])
        row("both", "loss", "", facts[2])
    return Constrain(grid, MAX_WIDTH)


def _facts(summary: TrainingSummary) -> tuple[str, str, str]:
    """Three short lines: rate, gradient, memory."""
    latest = summary.latest
    rate = f"{text.number(summary.episodes_per_s, 3)} episodes/s"
    if summary.skipped:
        rate += f", skipped {summary.skipped}"
    if latest is None:
        return rate, "", ""
    gradient = f"gradient norm {text.number(latest.grad_norm, 3)}"
    if (cosine := summary.mean("gradient_cosine")) is not None:  # measured at some steps alone
        gradient += f", cosine {cosine:+.2f}"
    memory = "" if latest.peak_memory_gib is None else f"memory {text.number(latest.peak_memory_gib, 3)} GiB"
    return rate, gradient, memory
