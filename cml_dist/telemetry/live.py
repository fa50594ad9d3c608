"""Running counts and the running training: bars on a terminal; elsewhere, and in the log, a line now and then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from textwrap import shorten

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task
from rich.table import Table
from rich.text import Text

from cml_dist.telemetry.metrics import StepMetrics
from cml_dist.telemetry.summary import TrainingSummary
from cml_dist.telemetry.text import duration

QUIET_S = 10.0
"""Seconds between two lines of a running count, which says nothing at all if it ends before."""

SILENT_S = 60.0
"""Seconds after which training says something even if ``log_every`` steps are not done."""

MAX_WIDTH = 100
"""Columns that live displays use at most."""

BAR_WIDTH = 8
"""Columns of a bar at least."""


Say = Callable[[Text, bool], None]
"""``say(line, on_screen)``: see :meth:`cml_dist.telemetry.console.Console.say`."""


class LiveDisplay(Progress):
    """Bars, and under them the state of the training."""

    def __init__(self, console: RichConsole, transient: bool) -> None:
        self.summary: TrainingSummary | None = None
        self._screen = console  # super() draws already
        super().__init__(
            console=console,
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=math.inf,  # a meta-step may take minutes
            transient=transient,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.summary is not None:
            yield Constrain(self.summary, MAX_WIDTH)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """A line each: on a narrow screen first the bar gives way, then words of the description."""
        shown = [task for task in tasks if task.visible]
        counts = [MofNCompleteColumn().render(task).plain for task in shown]
        times = [f"{duration(task.elapsed)}, left {duration(task.time_remaining)}" for task in shown]
        rest = min(self._screen.width, MAX_WIDTH) - 2 - _widest(counts) - _widest(times)
        name = min(_widest([task.description for task in shown]), rest)
        bar = rest - name - 1
        table = Table.grid(padding=(0, 1, 0, 0))
        for task, count, time in zip(shown, counts, times, strict=True):
            cells: list[RenderableType] = [Text(shorten(task.description, max(name, 1), placeholder="…"))]
            cells += [BarColumn(bar_width=bar).render(task)] if bar >= BAR_WIDTH else []
            cells += [Text(count, style="green", justify="right"), Text(time, style="cyan")]
            table.add_row(*cells)
        return table


def _widest(texts: list[str]) -> int:
    return max(map(cell_len, texts), default=0)


class ProgressView:
    """A running count; ``live`` has its bar, and is None without a terminal."""

    def __init__(
        self, say: Say, clock: Callable[[], float], live: LiveDisplay | None, description: str, total: int | None
    ) -> None:
        self._say, self._clock, self._live = say, clock, live
        self._description, self._of = description, "" if total is None else f"/{total}"
        if live is not None:
            self._task = live.add_task(description, total=total)
        self._line, self._spoke, self._last_s = "", False, clock()

    def update(self, done: int) -> None:
        """``done`` of the total are done."""
        if self._live is not None:
            self._live.update(self._task, completed=done)
        self._line = f"{self._description} {done}{self._of}"
        if self._clock() - self._last_s >= QUIET_S:
            self._flush()

    def close(self) -> None:
        """The bar goes; of lines the last one is said, if there were any."""
        if self._live is not None:
            self._live.remove_task(self._task)
            self._live.refresh()
        if self._spoke and self._line:
            self._flush()

    def _flush(self) -> None:
        self._say(Text(self._line), self._live is None)
        self._line, self._spoke, self._last_s = "", True, self._clock()


class TrainingView:
    """A running training; ``live`` has its bar and its figures, and is None without a terminal."""

    def __init__(self, say: Say, live: LiveDisplay | None, summary: TrainingSummary, description: str) -> None:
        self._say, self._live, self._summary = say, live, summary
        self._last_s = summary.clock()
        if live is not None:
            live.summary = summary
            self._task = live.add_task(description, total=summary.total_steps, completed=summary.step)

    def step(self, metrics: StepMetrics) -> None:
        """The next meta-step is done."""
        summary = self._summary
        summary.add(metrics.record())
        if self._live is not None:
            self._live.update(self._task, completed=metrics.step)
        due = metrics.step % summary.window == 0 or metrics.step == summary.total_steps
        if due or summary.clock() - self._last_s >= SILENT_S:
            self._last_s = summary.clock()
            self._say(Text(summary.line()), self._live is None)
