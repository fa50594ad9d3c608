"""What a meta-step measured: one strict JSON line of ``metrics.jsonl`` a step."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cml_dist.atomic import refused, write_bytes


@dataclass(frozen=True)
class StepMetrics:
    """The record of one meta-step, already reduced over all processes (sums by counts, never means of means).

    Attributes:
        step: the number of the finished meta-step, from 1.
        loss: what was minimised: ``outer_loss + gamma * colearner_loss`` (eq. 6) and what a method adds, mean over the
            episodes.
        outer_loss, colearner_loss: the learners' query losses; the co-learner's are None for a method without one.
        score, colearner_score: the query scores: accuracy (0 to 1) or MSE, as ``score_name`` says.
        grad_norm: global L2 norm of the meta-gradient before clipping.
        gradient_cosine: cosine between the co-learner's and the meta-learner's gradient on psi; None: not measured.
        lr: outer step size of this step.
        seconds: wall time of the step.
        episodes_per_s: episodes of the step over all processes / seconds.
        peak_memory_gib: largest memory of any process so far, GiB.
        skipped: whether the meta-gradient held NaN or inf, so that nothing moved.
        score_name: ``"accuracy"`` or ``"mse"``: the key that the scores get in the line.
    """

    step: int
    loss: float
    outer_loss: float
    score: float
    colearner_loss: float | None = None
    colearner_score: float | None = None
    grad_norm: float | None = None
    gradient_cosine: float | None = None
    lr: float | None = None
    seconds: float | None = None
    episodes_per_s: float | None = None
    peak_memory_gib: float | None = None
    skipped: bool = False
    score_name: str = "accuracy"

    def record(self) -> dict[str, Any]:
        """The line's keys and values in order; NaN and inf are null."""
        values = dict(vars(self))
        score_name = values.pop("score_name")
        names = {"score": score_name, "colearner_score": f"colearner_{score_name}"}
        return {names.get(key, key): _finite(value) for key, value in values.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """Appends records to ``metrics.jsonl``; each line reaches the file before ``write`` returns.

    The file stays open: a trainer that was cut off, and wakes up, goes on in its own, which ``keep_until`` of its
    successor has replaced, and not in the successor's.

    Raises:
        CmlError: the file cannot be written (full or read-only disk).

    *Collective*: none; only rank 0 has one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = open(path, "a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise refused(path, error) from error

    def write(self, metrics: StepMetrics) -> None:
        """Add one line."""
        try:
            self._file.write(json.dumps(metrics.record(), allow_nan=False) + "\n")
        except OSError as error:
            raise refused(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # a line that could not be written has been reported
            self._file.close()


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after ``step``, and what a kill left unreadable, so that a resumed run goes on seamlessly.

    The file is replaced in one move, also where all is kept: a kill in between leaves the old one whole.

    Raises:
        CmlError: the file cannot be written.
    """
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        write_bytes(path, b"".join(line for line in lines if (record := _parse(line)) and record["step"] <= step))


def read_metrics(path: str | os.PathLike[str], last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` or another file of JSON lines with a ``step``, oldest first.

    May be called beside a running trainer: what is torn or damaged is passed over; no file is no record.

    Args:
        last_bytes: read only what lies whole in so many bytes at the end (a line has about 350); None: everything.
    """
    try:
        with open(path, "rb") as file:
            start = 0 if last_bytes is None else max(0, file.seek(0, os.SEEK_END) - last_bytes)
            file.seek(start)
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return []
    return [record for line in lines[start > 0 :] if (record := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record, or None for a line that is torn (no line end), not JSON, or without a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict) and type(record.get("step")) is int
    return record if whole else None
