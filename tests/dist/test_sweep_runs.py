"""A sweep in real processes: killed, stopped and started again, it comes to the same results to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from launching import finish, spawn, until

from cml_dist.experiments.compare import compare, find_runs, read_run
from cml_dist.experiments.compare_tables import tables
from cml_dist.run.folder import RunFolder
from cml_dist.telemetry.metrics import read_metrics

pytestmark = pytest.mark.slow  # eighteen runs in processes of their own; a quick sweep is in tests/unit/test_repro.py

SETTINGS = {
    "run.device": "cpu", "parallel.threads": 1, "model.filters": 4, "domain.ways": 2, "domain.queries": 2,
    "train.steps": 12, "train.episodes_per_step": 2, "eval.every": 6, "eval.val_episodes": 2, "eval.episodes": 4,
    "checkpoint.every": 5,
}  # fmt: skip
NAMES = [f"method.name={method},seed={seed}" for method in ("maml", "cml") for seed in (0, 1, 2)]


def start(folder: Path, *words: str, **how: object):
    said = {"base": "glyphs", "set": SETTINGS, "axes": {"method.name": ["maml", "cml"]}, "seeds": 3}
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**said, "dir": str(folder / "runs"), **how}))
    return spawn([sys.executable, "-m", "cml_dist", "sweep", str(folder / "sweep.yaml"), "--at-once=2", *words])


def run(folder: Path, *words: str, **how: object) -> tuple[int, str]:
    process = start(folder, *words, **how)
    out = finish(process)
    return process.returncode, out


def steps(folder: Path) -> int:
    """Meta-steps that all runs have recorded."""
    return sum(len(read_metrics(folder / "runs" / name / "metrics.jsonl")) for name in NAMES)


def results(folder: Path) -> dict[str, list]:
    """What each run has computed, and the tables of scores and of their differences."""
    found = {"tables": tables(compare([read_run(place) for place in find_runs([str(folder / "runs")])]))[:2]}
    for name in NAMES:
        run = RunFolder(folder / "runs" / name)
        test = json.loads(run.eval_file.read_text())
        losses = [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run.metrics_file)]
        with np.load(run.scores_file) as scores:
            found[name] = [losses, test["step"], test["meta"], {key: scores[key].tolist() for key in scores}]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out = run(folder)
    assert code == 0 and "runs: 6 finished\n" in out, out
    return folder


def test_after_a_kill_of_everything_the_same_command_comes_to_the_same_results(undisturbed, tmp_path):
    process, at = start(tmp_path), random.randint(1, len(NAMES) * SETTINGS["train.steps"] - 1)
    until(lambda: steps(tmp_path) >= at or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    code, out = run(tmp_path)
    assert code == 0 and "runs: 6 finished\n" in out, f"killed at {at} of all steps:\n{out}"
    assert results(tmp_path) == results(undisturbed), f"killed at {at} of all steps"


def test_ctrl_c_has_the_runs_save_and_a_seed_more_starts_that_alone(undisturbed, tmp_path):
    longer = {"set": {**SETTINGS, "train.steps": 100000}}
    process = start(tmp_path, **longer)
    until(lambda: steps(tmp_path) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    out = finish(process)
    assert process.returncode == 130 and out.endswith("The same command goes on\n"), out
    states = [json.loads(path.read_text())["state"] for path in (tmp_path / "runs").glob("*/status.json")]
    assert states and set(states) == {"stopped"}, out
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "runs").glob("*/*")}
    code, out = run(undisturbed, seeds=[0, 1, 2, 3])
    assert code == 0 and out.count("Started ") == 2 and "8 finished\n" in out, out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    (tmp_path / "runs" / NAMES[0]).mkdir(parents=True)
    (tmp_path / "runs" / NAMES[0] / "notes.txt").touch()
    settings = {**SETTINGS, "train.steps": 2, "eval.final": False, "eval.every": 0}
    code, out = run(tmp_path, set=settings, axes={"method.name": ["maml"]})
    assert code == 1 and f"warning: Failed {NAMES[0]}: run.dir {tmp_path}/runs/{NAMES[0]} is not empty" in out, out
    assert f"Finished {NAMES[1]} in " in out
