"""How a training stands, for people: means over the last lines of ``metrics.jsonl``, rate, time left, best validation.

The live display, the lines of logs and ``cml-dist status`` are made of it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from cml_dist.telemetry import text

Best = tuple[int, float]
"""(step, score) of the best validation so far."""


@dataclass
class TrainingSummary:
    """Follows a run step by step; shown by rich as the block under the progress bar.

    Attributes:
        total_steps: meta-steps of the whole run.
        start_step: the last step that was done before this session (0 for a new run).
        window: losses and scores are means over so many steps.
        score_name: ``"accuracy"`` or ``"mse"``.
        clock: seconds, monotonic.
    """

    total_steps: int
    start_step: int = 0
    window: int = 50
    score_name: str = "accuracy"
    best: Best | None = None
    clock: Callable[[], float] = time.monotonic
    step: int = field(init=False)
    skipped: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.step = self.start_step
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=self.window)
        self._started = self.clock()

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in the next line of ``metrics.jsonl``."""
        self.step = record["step"]
        if record.get("skipped"):
            self.skipped += 1
        else:
            self._recent.append(record)

    def mean(self, key: str) -> float | None:
        """Mean of one value over the window, without skipped steps; None if it was never measured."""
        values = [record[key] for record in self._recent if record.get(key) is not None]
        return math.fsum(values) / len(values) if values else None

    @property
    def episodes_per_s(self) -> float | None:
        """Rate over the window: the harmonic mean, which is all episodes / all seconds for steps of one size."""
        rates = [record["episodes_per_s"] for record in self._recent if record.get("episodes_per_s")]
        return len(rates) / math.fsum(1 / rate for rate in rates) if rates else None

    @property
    def left_s(self) -> float | None:
        """Seconds that the remaining steps take at this session's pace, validations included; None at its start."""
        done = self.step - self.start_step
        return (self.clock() - self._started) / done * (self.total_steps - self.step) if done > 0 else None

    def figures(self) -> list[str]:
        """E.g. ``loss 1.234``, ``accuracy 51.2 %``, ``co-learner 50.1 %``, ``12.3 episodes/s``, ``skipped 1``."""
        name = self.score_name
        shown = [f"loss {text.number(self.mean('loss'))}"]
        shown.append(f"{text.score_label(name)} {text.score(name, self.mean(name))}")
        if (colearner := self.mean(f"colearner_{name}")) is not None:
            shown.append(f"co-learner {text.score(name, colearner)}")
        shown.append(f"{text.number(self.episodes_per_s, 3)} episodes/s")
        return [*shown, *([f"skipped {self.skipped}"] if self.skipped else [])]

    def details(self) -> list[str]:
        """What was measured of gradient norm, cosine and memory."""
        shown = []
        if (norm := self.mean("grad_norm")) is not None:
            shown.append(f"gradient norm {text.number(norm, 3)}")
        if (cosine := self.mean("gradient_cosine")) is not None:
            shown.append(f"cosine {cosine:+.2f}")
        if (memory := self.mean("peak_memory_gib")) is not None:
            shown.append(f"memory {text.number(memory, 3)} GiB")
        return shown

    def line(self) -> str:
        """One plain line: step, figures, and the time that is left."""
        ends = f"step {self.step}/{self.total_steps}", f"left {text.duration(self.left_s)}"
        return "  ".join([ends[0], *self.figures(), ends[1]])

    def __rich__(self) -> Group:
        """Losses and scores of both learners, and under them what else is worth watching."""
        name = self.score_name
        grid = Table.grid(Column(min_width=18), Column(justify="right", min_width=8), padding=(0, 3, 0, 0))
        grid.add_column(justify="right", min_width=9, no_wrap=True)
        grid.add_row(f"  mean of {self.window} steps", "loss", text.score_label(name), style="dim")
        rows = [("meta-learner", "outer_loss", name)]
        if self.mean("colearner_loss") is not None:
            rows += [("co-learner", "colearner_loss", f"colearner_{name}"), ("both", "loss", "")]
        for learner, loss, score in rows:
            shown = text.score(name, self.mean(score)) if score else ""
            grid.add_row(f"  {learner}", text.number(self.mean(loss)), Text(shown, style="bold"))
        facts = [figure for figure in self.figures() if figure.startswith("skipped") or figure.endswith("/s")]
        if self.best is not None:
            facts.append(f"best {text.score(name, self.best[1])} at step {self.best[0]}")
        below = Text("\n".join("   ".join(shown) for shown in (facts, self.details()) if shown), style="dim")
        return Group(grid, Padding(below, (0, 0, 0, 2)))
