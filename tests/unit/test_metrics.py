"""metrics.jsonl: strict JSON, whole lines, and no trace of a run that was killed."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path

import pytest

from cml_dist.atomic import append_json_line
from cml_dist.errors import CmlError
from cml_dist.telemetry.metrics import MetricsWriter, StepMetrics, keep_until, read_metrics

KEYS = (
    "step loss outer_loss accuracy colearner_loss colearner_accuracy grad_norm gradient_cosine lr seconds "
    "episodes_per_s peak_memory_gib skipped"
).split()


def at(step: int, loss: float = 1.5) -> StepMetrics:
    return StepMetrics(step, loss=loss, outer_loss=0.7, score=0.5, colearner_loss=0.8, colearner_score=0.4)


def written(path: Path, steps: range) -> Path:
    with closing(MetricsWriter(path)) as writer:
        for step in steps:
            writer.write(at(step))
    return path


def test_a_line_has_the_keys_that_scripts_rely_on():
    record = at(3).record()
    assert sorted(record) == sorted(KEYS)
    assert (record["step"], record["loss"], record["accuracy"], record["skipped"]) == (3, 1.5, 0.5, False)


def test_regression_reports_mse_instead_of_accuracy():
    record = StepMetrics(1, 1.0, 1.0, 2.5, score_name="mse").record()
    assert record["mse"] == 2.5
    assert "accuracy" not in record and "colearner_mse" in record


def test_nan_and_inf_become_null_and_floats_survive_to_the_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    loss = 0.1 + 0.2
    with closing(MetricsWriter(path)) as writer:
        writer.write(StepMetrics(1, loss, math.nan, math.inf, grad_norm=-math.inf, skipped=True))
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] == loss
    assert record["outer_loss"] is record["accuracy"] is record["grad_norm"] is None
    assert record["skipped"] is True


def test_each_line_is_in_the_file_at_once_and_a_later_writer_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsWriter(path)
    first.write(at(1))
    assert [r["step"] for r in read_metrics(path)] == [1]  # not closed yet
    first.close()
    written(path, range(2, 4))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


def test_truncating_keeps_the_lines_up_to_the_step_and_drops_a_torn_one(tmp_path):
    path = written(tmp_path / "metrics.jsonl", range(1, 6))
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + whole[0][:20])
    keep_until(path, 3)
    assert path.read_bytes() == b"".join(whole[:3])
    written(path, range(4, 5))
    assert path.read_bytes() == b"".join(whole[:4])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_complete_record_without_line_end_is_torn_too(tmp_path):
    # Appending to it would give one line with two records.
    path = written(tmp_path / "metrics.jsonl", range(1, 3))
    path.write_bytes(path.read_bytes()[:-1])
    keep_until(path, 9)
    assert [r["step"] for r in read_metrics(path)] == [1]


def test_a_writer_that_was_cut_off_does_not_go_on_in_the_new_ones_file(tmp_path):
    path = written(tmp_path / "metrics.jsonl", range(1, 4))
    before = path.read_bytes()
    with closing(MetricsWriter(path)) as cut_off:
        keep_until(path, 3)
        cut_off.write(at(4))
    assert path.read_bytes() == before
    keep_until(tmp_path / "none.jsonl", 3)


def test_a_kill_while_truncating_loses_nothing(tmp_path, monkeypatch):
    path = written(tmp_path / "metrics.jsonl", range(1, 4))
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(CmlError, match=r"cannot write .*metrics\.jsonl: No space left on device; free space"):
        keep_until(path, 1)
    assert path.read_bytes() == before


def test_reading_passes_over_what_is_torn_or_missing(tmp_path):
    path = written(tmp_path / "metrics.jsonl", range(1, 4))
    lines = path.read_bytes().splitlines(keepends=True)
    assert [r["step"] for r in read_metrics(path, last_bytes=len(lines[1] + lines[2]) + 5)] == [2, 3]
    path.write_bytes(lines[0] + b'{"step": \n' + lines[2][:9])
    assert [r["step"] for r in read_metrics(path)] == [1]
    assert read_metrics(tmp_path / "nowhere.jsonl") == []


def test_an_unwritable_file_is_named(tmp_path):
    with pytest.raises(CmlError, match="cannot write .*no-folder.*: No such file or directory"):
        MetricsWriter(tmp_path / "no-folder" / "metrics.jsonl")
    with closing(MetricsWriter(Path("/dev/full"))) as full, pytest.raises(CmlError, match="No space left on device"):
        full.write(at(1))


def test_a_torn_line_does_not_swallow_the_next_record(tmp_path):
    path = tmp_path / "sessions.jsonl"
    append_json_line(path, {"step": 1})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "ti')
    append_json_line(path, {"step": 3})
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "ti', '{"step": 3}']
