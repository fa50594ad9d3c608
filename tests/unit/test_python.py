"""``cml_dist.train`` and ``cml_dist.evaluate``: the commands, for Python that goes on afterwards."""

from __future__ import annotations

import json
import os
import signal

import pytest

import cml_dist
from cml_dist.errors import CheckpointError, ConfigError

SMALL = ["train.steps=4", "eval.every=2", "eval.val_episodes=2", "eval.episodes=4", "model.hidden=[4]"]


def test_train_returns_the_folder_that_load_and_evaluate_take(tmp_path):
    run = cml_dist.train("sinusoid", [*SMALL, f"run.dir={tmp_path / 'run'}"])
    tested = json.loads((run / "eval.json").read_text())
    found = cml_dist.evaluate(run)
    assert json.loads(json.dumps(found)) == tested
    assert cml_dist.evaluate(run, ["eval.episodes=6"], checkpoint="last")["meta"]["episodes"] == 6
    assert cml_dist.load(run).adapt([[0.0], [1.0]], [0.0, 1.0]).predict([[0.5]]).shape == (1, 1)


def test_a_stopped_run_does_not_look_finished_and_the_same_call_goes_on(tmp_path):
    def stop(step, what):
        if (step, what) == (2, "step"):
            os.kill(os.getpid(), signal.SIGINT)

    settings = [*SMALL, f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(KeyboardInterrupt, match="was stopped and saved; the same call goes on"):
        cml_dist.train("sinusoid", settings, on_step=stop)
    assert cml_dist.train("sinusoid", settings) == tmp_path / "run"


def test_what_a_user_can_mend_is_raised(tmp_path):
    with pytest.raises(ConfigError, match="did you mean train.steps"):
        cml_dist.train("sinusoid", ["train.step=4"])
    with pytest.raises(CheckpointError, match="is no run folder"):
        cml_dist.evaluate(tmp_path)
