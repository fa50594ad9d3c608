"""DeepSpeed's strategies from the command line: the launch files, one whole run, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from launching import ROOT, finish, run, run_ranks, start, until

from cml_dist.telemetry.metrics import read_metrics

SETTINGS = (
    "domain.shots=5", "domain.queries=5", "model.hidden=[8, 8]", "method.inner_steps=2", "engine.name=graph",
    "train.episodes_per_step=3", "eval.every=0", "eval.val_episodes=5", "eval.episodes=7", "checkpoint.every=10", "parallel.threads=1",
)  # fmt: skip


def command(folder: Path, *overrides: str) -> tuple[str, ...]:
    return ("-m", "cml_dist", "train", "sinusoid", f"run.dir={folder}", *SETTINGS, *overrides)


def lines(folder: Path) -> list[dict]:
    return list(read_metrics(folder / "metrics.jsonl"))


@pytest.mark.parametrize("file", [pytest.param("zero2-offload", marks=pytest.mark.slow), "zero3-offload"])
def test_a_run_stops_and_goes_on_in_another_world(tmp_path, file):
    """Trains on 2 ranks under DeepSpeed, is stopped, ends as one plain process, is tested and exported."""
    folder, launch = tmp_path / "run", ROOT / "launch" / "accelerate" / f"{file}.yaml"
    process = start(2, *command(folder, "train.steps=100000"), launch_file=launch)
    until(lambda: (folder / "metrics.jsonl").is_file() and len(lines(folder)) >= 5)
    process.send_signal(signal.SIGINT)
    out = finish(process)
    assert "everything is saved" in out, out
    stage, _, _ = file.partition("-")
    words, offload = ("optimizer", "optimizer") if stage == "zero2" else ("optimizer and parameters", "all")
    assert f"2 processes ({stage}, {words} on the CPU)" in out
    assert "Warning" not in out and "[INFO]" not in out, out
    saved = json.loads((folder / "deepspeed.json").read_text())
    assert saved["zero_optimization"]["stage"] == int(stage[4]) and saved["train_batch_size"] == 2
    stopped_at = len(lines(folder))
    steps = f"train.steps={stopped_at + 3}"
    code, out = run_ranks(1, *command(folder, steps))
    assert code == 0 and f"Resuming at step {stopped_at}" in out, out
    assert (folder / "eval.json").is_file() and list((folder / "export").glob("*.safetensors"))
    whole = tmp_path / "whole"
    asked = (f"parallel.strategy={stage}", f"parallel.offload={offload}")
    code, out = run_ranks(2, *command(whole, steps, *asked))
    assert code == 0, out
    assert (whole / "eval.json").is_file() and list((whole / "export").glob("*.safetensors"))
    for one, two in zip(lines(folder), lines(whole), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4), one["step"]


@pytest.mark.slow  # what each file brings up: test_launcher.py
@pytest.mark.parametrize(
    ("file", "strategy"), [("zero1", "zero1"), ("zero3", "zero3"), ("cpu", "zero2")]
)
def test_launch_files_bring_up_their_strategy(tmp_path, file, strategy):
    """Each file as it is (zero2 in test_launch.py); and a plain launcher, where the configuration asks for ZeRO."""
    launch = ROOT / "launch" / "accelerate" / f"{file}.yaml"
    asked = () if file != "cpu" else (f"parallel.strategy={strategy}",)
    settings = ("train.steps=2", "eval.final=false", *asked)
    code, out = run(2, *command(tmp_path / "run", *settings), launch_file=launch)
    assert code == 0 and f"2 processes ({strategy})" in out, out


@pytest.mark.slow  # the rule: test_deepspeed_config.py
def test_what_contradicts_the_launcher_is_refused_in_one_line(tmp_path):
    launch = ROOT / "launch" / "accelerate" / "zero2.yaml"
    code, out = run(2, *command(tmp_path / "run", "parallel.strategy=zero3"), launch_file=launch)
    assert code != 0
    assert f"error: parallel.strategy is zero3, but the launcher's Accelerate file {launch} sets up DeepSpeed's zero2" in out
    assert out.count("error: ") == 1 and not (tmp_path / "run").exists()


def test_deepspeed_that_is_not_installed_is_refused_in_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'deepspeed' else find(name, *rest)\n"
    )
    code, out = run(
        1, *command(tmp_path / "run", "parallel.strategy=zero2"), PYTHONPATH=f"{tmp_path}:{ROOT}"
    )
    assert code != 0 and out.count("error: ") == 1 and not (tmp_path / "run").exists()
    assert "error: parallel.strategy is one of DeepSpeed's, but deepspeed is not installed; pip install" in out
