"""``run.profile``: what it leaves behind, what it says, and that it changes nothing else."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
import torch
from test_trainer import at, configure, failing, losses

from cml_dist.errors import ConfigError
from cml_dist.run.hooks import nothing
from cml_dist.run.profile import StepProfile
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

SHORT = ("train.steps=4", "eval.final=false", "eval.every=0")


def go(folder, *overrides, on_step=nothing):
    """Train; what was said."""
    screen = io.StringIO()
    train(configure(folder, *SHORT, *overrides), Console(screen), on_step=on_step)
    return screen.getvalue()


def spans(folder, name):
    """The meta-steps of a trace."""
    with gzip.open(folder / "profile" / name, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event["name"].startswith("meta-step")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    assert "rofile" not in go(folder) and not (folder / "profile").exists()
    return losses(folder)


def test_a_trace_of_these_steps_with_memory_and_no_other_value(plain, tmp_path, capfd):
    said = go(tmp_path / "run", "run.profile=2:3")
    assert losses(tmp_path / "run") == plain
    (path,) = (tmp_path / "run" / "profile").iterdir()
    assert path.name == "steps_2-3.rank0.trace.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["name"] for event in events} >= {"meta-step 2", "meta-step 3", "aten::addmm"}
    assert max(event["args"]["bytes"] for event in events if event["ph"] == "C") > 1000
    assert f"Trace: {path}, for https://ui.perfetto.dev" in said
    assert "Most time in meta-steps 2 to 3" in said and "aten::" in said and "memory_viz" not in said
    assert "profiler_st" not in capfd.readouterr().err, "the profiler's own lines are not shown"


def test_a_resumed_run_profiles_what_is_left_and_says_so_where_nothing_is(plain, tmp_path):
    folder = tmp_path / "run"
    go(folder, "train.steps=2")
    said = go(folder, "run.profile=2:3")
    assert spans(folder, "steps_3-3.rank0.trace.json.gz") == ["meta-step 3"]
    assert "Most time in meta-step 3" in said and losses(folder) == plain
    said = go(folder, "train.steps=5", "run.profile=2:3")
    assert "run.profile is 2:3, but 4 meta-steps are done: nothing is profiled" in said
    assert len(list((folder / "profile").iterdir())) == 1


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_a_snapshot_of_its_memory_besides(plain, tmp_path, monkeypatch):
    """Without one: what is asked of torch, with the names that it has."""
    asked = []
    monkeypatch.setattr(StepProfile, "_on_gpu", True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: asked.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).touch())
    said = go(tmp_path / "run", "run.profile=2:3")
    (memory,) = (tmp_path / "run" / "profile").glob("*.pickle")
    assert memory.name == "steps_2-3.rank0.memory.pickle" and losses(tmp_path / "run") == plain
    assert asked == [{"stacks": "python", "max_entries": 100_000}, {"enabled": None}]
    assert f"Memory: {memory}, for https://pytorch.org/memory_viz" in said and "the profiler saw no kernel" in said


def test_a_run_that_fails_in_these_steps_leaves_a_trace_of_what_there_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, "run.profile=2:4", on_step=at(2, "episode", failing(KeyboardInterrupt)))
    assert spans(tmp_path, "steps_2-3.rank0.trace.json.gz") == ["meta-step 2", "meta-step 3"]


def test_a_profile_that_cannot_be_written_ends_no_run(plain, tmp_path):
    def block():
        (tmp_path / "run" / "profile").touch()

    said = go(tmp_path / "run", "run.profile=2:3", on_step=at(0, "started", block))
    assert "the profile could not be written: " in said
    assert losses(tmp_path / "run") == plain


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("3:2", "run.profile: '3:2' is no range of meta-steps: give the first and the last, from 1"),
        ("0:2", "'0:2' is no range"),
        ("7", "7 is no range"),
        ("2:13", "run.profile is 2:13, but train.steps is 12: end it at 12, or train longer"),
    ],
)
def test_no_range_is_refused(value, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        configure(tmp_path, f"run.profile={value}")


def test_two_numbers_are_no_number_to_base_60(tmp_path):
    assert configure(tmp_path, "run.profile=2:3").run.profiled_steps == range(2, 4)
