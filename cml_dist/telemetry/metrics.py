"""What a meta-step measured: one strict JSON line of ``metrics.jsonl`` a step."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from cml_dist.atomic import atomic_file
from cml_dist.errors import CheckpointError


@dataclass(frozen=True)
class StepMetrics:
    """The record of one meta-step, already reduced over all processes (sums by counts, never means of means).

    Attributes:
        step: the number of the finished meta-step, from 1.
        loss: what was minimised: ``outer_loss + gamma * colearner_loss`` (eq. 6), mean over the episodes.
        outer_loss: the meta-learner's query loss after adaptation.
        colearner_loss: the co-learner's query loss; None for a method without one.
        score: the meta-learner's query score: accuracy (0 to 1) or MSE, as ``score_name`` says.
        colearner_score: the co-learner's query score; None for a method without one.
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
        values = asdict(self)
        score_name = values.pop("score_name")
        names = {"score": score_name, "colearner_score": f"colearner_{score_name}"}
        return {names.get(key, key): _finite(value) for key, value in values.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsWriter:
    """Appends records to ``metrics.jsonl``; each line reaches the file before ``write`` returns.

    *Collective*: none; only rank 0 has one.

    Args:
        path: the file; it is made with the first line, and an existing one is continued.

    Raises:
        CheckpointError: the file cannot be written (full or read-only disk).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def write(self, metrics: StepMetrics) -> None:
        """Add one line."""
        line = json.dumps(metrics.record(), allow_nan=False) + "\n"
        try:
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8", buffering=1)
            self._file.write(line)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def truncate_after(self, step: int) -> int:
        """Drop the lines after ``step``, and what a kill left unreadable, so that a resumed run goes on seamlessly.

        The file is replaced in one move: a kill in between leaves the old one whole.

        Args:
            step: the last meta-step that is kept.

        Returns:
            The number of lines dropped.
        """
        self.close()
        if not self.path.exists():
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (record := _parse(line)) is not None and record["step"] <= step]
        # Replaced also where all is kept: a trainer that was cut off, with the old file open, must not go on in ours.
        try:
            with atomic_file(self.path) as fresh:
                fresh.write_bytes(b"".join(kept))
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file; a later ``write`` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                raise _cannot_write(self.path, error) from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, without a last line that is still being written.

    Raises:
        CheckpointError: there is no such file, or a line before the last is damaged (its number is named).
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", "name the folder of a run that has trained"
        ) from error
    records = [_parse(line) for line in lines]
    if records and records[-1] is None:
        records.pop()
    for number, record in enumerate(records, start=1):
        if record is None:
            raise CheckpointError(
                f"{path}, line {number}, is no metrics record", "remove the line, or resume the run, which drops it"
            )
    return records  # type: ignore[return-value]


def read_tail(path: str | os.PathLike[str], limit: int = 1 << 16) -> list[dict[str, Any]]:
    """The records that lie whole in the last ``limit`` bytes of a file of JSON lines with a ``step``, oldest first.

    For readers beside a running trainer: what is torn or damaged is passed over; no file is no record.
    """
    try:
        with open(path, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - limit)
            file.seek(start)
            lines = file.read(limit).splitlines(keepends=True)
    except OSError:
        return []
    return [record for line in lines[start > 0 :] if (record := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record, or None for a line that is torn (no line end), not JSON, or without a step."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written: {error.strerror}", "free some space or choose another run.dir, then resume"
    )
