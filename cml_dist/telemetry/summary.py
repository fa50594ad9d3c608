"""What the last meta-steps looked like, for people: means over a window, rate, time left, best validation."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cml_dist.telemetry import text
from cml_dist.telemetry.metrics import StepMetrics


@dataclass
class TrainingSummary:
    """Follows a run step by step.

    Attributes:
        total_steps: meta-steps of the whole run.
        start_step: the last step that was done before this session (0 for a new run).
        window: losses and scores are means over so many steps.
        score_name: ``"accuracy"`` or ``"mse"``.
        best: (step, score) of the best validation so far; None before the first.
        clock: seconds from a monotonic clock.
    """

    total_steps: int
    start_step: int = 0
    window: int = 50
    score_name: str = "accuracy"
    best: tuple[int, float] | None = None
    clock: Callable[[], float] = time.monotonic
    step: int = field(init=False)
    skipped: int = field(init=False, default=0)
    latest: StepMetrics | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.step = self.start_step
        self._recent: deque[StepMetrics] = deque(maxlen=self.window)
        self._started = self.clock()

    def add(self, metrics: StepMetrics) -> None:
        """Take in the next step."""
        self.step = metrics.step
        self.latest = metrics
        if metrics.skipped:
            self.skipped += 1
        else:
            self._recent.append(metrics)

    def mean(self, name: str) -> float | None:
        """Mean of one field of :class:`StepMetrics` over the window, without skipped steps; None if never measured."""
        values = [value for metrics in self._recent if (value := getattr(metrics, name)) is not None]
        return math.fsum(values) / len(values) if values else None

    @property
    def episodes_per_s(self) -> float | None:
        """Rate over the window: the harmonic mean, which is all episodes / all seconds for steps of one size."""
        rates = [metrics.episodes_per_s for metrics in self._recent if metrics.episodes_per_s]
        return len(rates) / math.fsum(1 / rate for rate in rates) if rates else None

    @property
    def elapsed_s(self) -> float:
        """Seconds of this session, validation included."""
        return self.clock() - self._started

    @property
    def left_s(self) -> float | None:
        """Seconds that the remaining steps will take at this session's pace; None before the first step."""
        done = self.step - self.start_step
        return self.elapsed_s / done * (self.total_steps - self.step) if done > 0 else None

    def best_text(self) -> str:
        """E.g. ``53.4 % at step 500``."""
        return (
            "none yet" if self.best is None else f"{text.score(self.score_name, self.best[1])} at step {self.best[0]}"
        )

    def line(self) -> str:
        """One plain line, e.g. ``step 100/1500  loss 1.234  accuracy 51.2 %  co 50.1 %  12.3 ep/s  left 2:10``."""
        parts = [f"step {self.step}/{self.total_steps}", f"loss {text.number(self.mean('loss'))}"]
        parts.append(f"{self.score_name} {text.score(self.score_name, self.mean('score'))}")
        if (colearner := self.mean("colearner_score")) is not None:
            parts.append(f"co {text.score(self.score_name, colearner)}")
        if (rate := self.episodes_per_s) is not None:
            parts.append(f"{text.number(rate, 3)} ep/s")
        if self.skipped:
            parts.append(f"skipped {self.skipped}")
        parts.append(f"left {text.duration(self.left_s)}")
        return "  ".join(parts)
