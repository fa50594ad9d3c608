"""Trackers are off by default, refused where their package is missing, and never end a run."""

from __future__ import annotations

import pytest
import yaml
from accelerate.tracking import TensorBoardTracker

from cml_dist.config.load import load_config
from cml_dist.errors import ConfigError
from cml_dist.run.folder import differences
from cml_dist.run.trainer import train
from cml_dist.telemetry import trackers
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.metrics import read_metrics

SETTINGS = (
    "domain.shots=5", "domain.queries=5", "model.hidden=[8]", "train.steps=6", "train.episodes_per_step=2",
    "eval.every=3", "eval.val_episodes=3", "eval.episodes=3", "eval.untrained=false", "parallel.threads=1",
)  # fmt: skip


class Listening(Console):
    def __init__(self):
        super().__init__(quiet=True)
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


def configure(folder, *overrides):
    return load_config("sinusoid", [f"run.dir={folder}", *SETTINGS, *overrides])


def go(folder, *overrides):
    """Warnings of a run that finishes."""
    console = Listening()
    assert train(configure(folder, *overrides), console).finished
    assert len(read_metrics(folder / "metrics.jsonl")) == 6
    return console.warnings


def test_none_is_there_unless_asked_for(tmp_path):
    assert configure(tmp_path).run.trackers == ()
    assert go(tmp_path / "run") == []
    assert not {"tensorboard", "wandb"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_a_missing_package_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb, which is not installed; pip install 'cml-dist\[trackers\]'"):
        train(configure(tmp_path / "run", "run.trackers=wandb"), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="run.trackers"):
        configure(tmp_path, "run.trackers=[mlflow]")


def test_one_that_fails_is_left_out_with_one_warning(tmp_path, monkeypatch):
    log, calls = TensorBoardTracker.log, []

    def failing(self, values, step=None, **rest):
        calls.append(step)
        if step >= 3:
            raise OSError(28, "No space left on device")
        log(self, values, step, **rest)

    monkeypatch.setattr(TensorBoardTracker, "log", failing)
    (warning,) = go(tmp_path / "run", "run.trackers=tensorboard")
    assert warning.startswith("tensorboard failed, and the run goes on without it: ") and "No space left" in warning
    assert calls == [1, 2, 3]


def test_one_that_cannot_start_is_left_out_with_one_warning(tmp_path, monkeypatch):
    def no_server(self):
        raise RuntimeError("api_key not configured\n  (no-tty)")

    monkeypatch.setattr(trackers.WandBTracker, "start", no_server)
    assert go(tmp_path / "run", "run.trackers=wandb") == [
        "wandb failed, and the run goes on without it: api_key not configured (no-tty)"
    ]


def test_one_that_does_not_end_is_not_waited_for(tmp_path, monkeypatch):
    from threading import Event

    never = Event()
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: never.wait())
    monkeypatch.setattr(trackers, "CLOSE_S", 0.1)
    assert go(tmp_path / "run", "run.trackers=tensorboard") == [
        "tensorboard has not taken everything in 0.1 s; it is kept in the run folder"
    ]
    never.set()


def test_the_configuration_is_shown(tmp_path):
    assert go(tmp_path / "run", "run.trackers=tensorboard") == []
    (file,) = (tmp_path / "run" / "tensorboard").glob("*/hparams.yml")
    shown = yaml.safe_load(file.read_text())
    assert (shown["method.gamma"], shown["optim.lr"], shown["model.hidden"]) == (0.2, 0.001, "[8]")


def test_a_run_may_be_resumed_with_other_trackers(tmp_path):
    then, now = configure(tmp_path), configure(tmp_path, "run.trackers=[wandb]", "run.tracker_project=mine")
    assert differences(then, now) == {}
