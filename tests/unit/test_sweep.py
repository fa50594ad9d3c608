"""Sweeps: what a file expands to, what is refused before anything starts, how runs stand, and what SLURM is handed."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from test_slurm_launch import play, what_job_sh_gets
from test_status import DEAD_PID, make_run

from cml_dist.cli import main
from cml_dist.config.load import dump_config, load_config
from cml_dist.config.sweep import Sweep, parse_sweep
from cml_dist.experiments.pool import places

SMALL = {"run.device": "cpu", "train.steps": 100}
NAMES = ["method.name=maml,seed=0", "method.name=maml,seed=1", "method.name=cml,seed=0", "method.name=cml,seed=1"]
FOUR = {"set": SMALL, "axes": {"method.name": ["maml", "cml"]}, "seeds": 2}


def described(**how: object) -> Sweep:
    return parse_sweep({"base": "glyphs", "dir": "study", **how}, "study.yaml")


def names(**how: object) -> list[str]:
    return [run.name for run in described(**how).runs()]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(*words: str, **how: object) -> int:
    """``cml-dist sweep`` of a file that says this."""
    Path("study.yaml").write_text(yaml.safe_dump({"base": "glyphs", "dir": "study", **how}, sort_keys=False))
    return main(["sweep", "study.yaml", *words])


def begun(name: str, state: str, **status: object) -> Path:
    """A run of :data:`FOUR` in its folder: half a second a meta-step, 60 of 100 done."""
    folder = make_run(Path("study", name), state, **status)
    method, seed = (word.rpartition("=")[2] for word in name.split(","))
    settings = [f"{key}={value}" for key, value in SMALL.items()]
    config = load_config("glyphs", [*settings, f"method.name={method}", f"run.seed={seed}", f"run.dir=study/{name}"])
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


# --------------------------------------------------------------------------- expansion


def test_axes_make_every_combination_with_names_by_the_last_words_of_keys():
    runs = described(set=SMALL, axes={"method.name": ["cml", "boil"], "method.inner_steps": [1, 5]}, seeds=2).runs()
    assert len(runs) == 8 and runs[3].name == "method.name=cml,inner_steps=5,seed=1"
    own = ["method.name=cml", "method.inner_steps=5", "run.seed=1"]
    assert runs[3].overrides == ["run.device=cpu", "train.steps=100", *own]
    assert [run.overrides[-1] for run in runs[:2]] == ["run.seed=0", "run.seed=1"]


def test_zip_takes_values_together_and_words_that_two_keys_end_in_keep_their_section():
    found = names(zip={"run.seed": [0, 1], "eval.seed": [7, 8], "optim.lr": ["1e-3", 0.01]})
    assert found == ["run.seed=0,eval.seed=7,lr=1e-3", "run.seed=1,eval.seed=8,lr=0.01"]


def test_variants_have_names_of_their_own_and_may_replace_what_all_have():
    wide = {"model": {"filters": 64}, "train.steps": 7}
    runs = described(set=SMALL, variants={"small": {}, "wide": wide}, seeds=[3]).runs()
    assert [run.name for run in runs] == ["small,seed=3", "wide,seed=3"]
    assert runs[1].overrides == ["run.device=cpu", "train.steps=7", "model.filters=64", "run.seed=3"]


def test_random_draws_follow_from_the_seed_and_lie_in_their_ranges():
    ranges = {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "method.inner_steps": {"low": 1, "high": 3}}
    few, many = (described(random={"draws": n, "seed": 5, "ranges": ranges}).runs() for n in (3, 300))
    drawn = ["lr=0.007181,inner_steps=2", "lr=0.02798,inner_steps=2", "lr=0.007277,inner_steps=3"]
    assert [run.name for run in few] == drawn
    assert [run.name for run in many[:3]] == [run.name for run in few]
    alone = described(random={"draws": 3, "seed": 5, "ranges": {"optim.lr": ranges["optim.lr"]}}).runs()
    assert [run.settings["optim.lr"] for run in alone] == [run.settings["optim.lr"] for run in few]
    steps = [run.settings["method.inner_steps"] for run in many]
    assert {type(step) for step in steps} == {int} and set(steps) == {1, 2, 3}
    rates = [math.log10(run.settings["optim.lr"]) for run in many]
    assert min(rates) >= -4 and max(rates) <= -1 and abs(sum(rates) / len(rates) + 2.5) < 0.15


def test_names_stay_where_values_are_added_and_a_value_named_twice_is_one_run():
    before = names(axes={"method.name": ["cml"]}, seeds=[0])
    after = names(axes={"method.name": ["maml", "cml", "cml"]}, seeds=3)
    assert set(before) < set(after) and len(after) == len(set(after)) == 6


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "nothing varies; give variants, axes, zip, random or seeds"),
        ({"axis": {"run.seed": [0]}}, "axis: no key of a sweep; use axes"),
        ({"axes": {"run.seed": []}}, "run.seed has no values"),
        ({"axes": {"run.seed": [0]}, "seeds": 2}, "run.seed varies in two places"),
        ({"zip": {"run.seed": [0], "eval.seed": [1, 2]}}, "zip has 1 of run.seed, 2 of eval.seed"),
        ({"variants": {"../up": {}}}, "a variant is called '../up'"),
        ({"variants": {"a": {"run": {"dir": "x"}}}}, "run.dir is set; the sweep's dir says where its runs are"),
        ({"random": {"draws": 2, "ranges": {"optim.lr": {"low": 1, "high": 1}}}}, "set low < high"),
        ({"axes": {"model.backbone": ["a/b", "a_b"]}}, "two different runs of the sweep are called backbone=a_b"),
        ({"axes": {"model.backbone": ["x" * 300]}}, "a run's name has 309 characters"),
        ({"axes": {"train.step": [1]}}, "run step=1: glyphs: train.step is not a setting; did you mean train.steps?"),
        ({"axes": {"method.inner_steps": [1, -1]}}, "run inner_steps=-1: glyphs: method.inner_steps is -1"),
        ({"seeds": 100, "axes": {"eval.seed": [*range(100)]}}, "study.yaml makes 10,000 runs; add --yes"),
        ({"axes": {"method.name": ["cml", "mine.py:Rule"]}}, "name it on the command line: --code mine.py:Rule"),
        ({"base": "glyfs", "seeds": 2}, "did you mean glyphs?"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_starts(here, capfd, how, said):
    assert sweep(**how) == 2
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["study.yaml"]


def test_another_sweep_in_the_folder_is_refused_and_more_values_are_not(here, capfd):
    for name in NAMES:
        begun(name, "finished")
    assert sweep(**FOUR) == 0
    assert sweep("--plan", **{**FOUR, "set": {**SMALL, "parallel.threads": 1}, "seeds": 3}) == 0
    capfd.readouterr()
    for change in ({"set": {**SMALL, "train.steps": 200}}, {"axes": {"method.inner_steps": [1]}}, {"base": "omniglot"}):
        assert sweep(**{**FOUR, **change}) == 1
        assert "study holds another sweep: " in capfd.readouterr().err
    (here / "study" / NAMES[0] / "config.yaml").write_text(dump_config(load_config("glyphs", ["optim.lr=0.5"])))
    assert sweep(**FOUR) == 1
    assert f"run {NAMES[0]}: study/{NAMES[0]} holds a run of another configuration" in capfd.readouterr().err


# --------------------------------------------------------------------------- how runs stand


def test_the_plan_counts_what_is_left_and_names_what_is_broken(here, capfd):
    begun(NAMES[0], "finished", step=100)
    begun(NAMES[1], "stopped")
    (begun(NAMES[2], "stopped") / "config.yaml").write_text("run: [")
    assert sweep("--plan", "--at-once=2", **{**FOUR, "seeds": 3}) == 0
    out, err = capfd.readouterr()
    assert "runs: 6: 1 finished, 1 to go on with, 3 to begin, 1 broken\n" in out
    assert "each: 20 s to 50 s of training (0.50 s a meta-step, from the runs that are there); " in out
    assert "all: 1 min 25 s of training\n" in out  # 40 + 3 * 100 meta-steps of half a second, two at once
    assert err.startswith(f"warning: Left out: {NAMES[2]}: study/{NAMES[2]}/config.yaml is no valid YAML")
    assert not (here / "study" / "sweep.json").exists()


def test_a_run_of_a_process_that_is_gone_goes_on_and_one_that_lives_is_left_alone(here, capfd):
    begun(NAMES[0], "running", host="elsewhere")
    begun(NAMES[1], "running", host=socket.gethostname(), pid=DEAD_PID)
    with subprocess.Popen(["true"]) as unburied:
        os.waitid(os.P_PID, unburied.pid, os.WEXITED | os.WNOWAIT)
        begun(NAMES[2], "running", host=socket.gethostname(), pid=unburied.pid)
        assert sweep("--plan", **FOUR) == 0
    out = capfd.readouterr().out
    assert "runs: 4: 1 running, 2 to go on with, 1 to begin\n" in out and f"{NAMES[0]} is running\n" in out


def test_status_of_a_sweep_has_runs_that_wait_and_the_time_left(here, capfd):
    for name in NAMES[:2]:
        begun(name, "finished", step=100)
    assert sweep(**{**FOUR, "axes": {"method.name": ["maml"]}}) == 0
    record = json.loads(Path("study/sweep.json").read_text())
    Path("study/sweep.json").write_text(json.dumps({**record, "axes": FOUR["axes"]}))
    begun(NAMES[2], "running", host="elsewhere")
    capfd.readouterr()
    assert main(["status", "study"]) == 0
    out = capfd.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "%" in line or line.endswith(("waiting", "-"))] == NAMES
    assert "2 finished, 1 running, 1 waiting; about 1 min 10 s left, without validations and tests\n" in out
    assert main(["status", "study", "--check"]) == 3
    assert f"study/{NAMES[3]}: waiting\n" in capfd.readouterr().out


def test_each_run_at_a_time_has_gpus_and_cores_of_its_own_while_there_are_enough(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 4})
    assert places(2, 2, ["4", "5", "6", "7"]) == [(("4", "5"), (0, 1)), (("6", "7"), (2, 4))]
    assert [place.gpus for place in places(3, 1, ["a", "b"])] == [("a",), ("b",), ("a",)]
    assert places(1, 1, []) == [((), (0, 1, 2, 4))]
    assert {place.cores for place in places(5, 1, [])} <= {(0,), (1,), (2,), (4,), (0, 1, 2, 4)}


# --------------------------------------------------------------------------- SLURM


SLURM = ("--slurm", "--time=60", "--gpus-per-node=1")


def test_an_array_has_a_task_for_each_run_that_is_due_and_none_twice(here, capfd, monkeypatch):
    begun(NAMES[1], "finished", step=100)
    due = [NAMES[0], *NAMES[2:]]
    monkeypatch.setenv("PATH", play(here / "bin", sbatch="cat > submitted; echo 12", squeue='printf "12 0\\n12 2\\n"'))
    assert sweep(*SLURM, "--dry-run", "--at-once=2", **FOUR) == 0
    script = capfd.readouterr().out
    assert "#SBATCH --array=0-2%2\n" in script
    for task, name in enumerate(due):
        got = what_job_sh_gets(here, script, SLURM_ARRAY_TASK_ID=str(task))
        method, seed = (word.rpartition("=")[2] for word in name.split(","))
        settings = ["run.device=cpu", "train.steps=100", f"method.name={method}", f"run.seed={seed}"]
        assert got[0] == f"{here}/study/{name}" and got[-5:] == ["glyphs", *settings]
    with pytest.raises(AssertionError, match="array task 3 has no run"):
        what_job_sh_gets(here, script, SLURM_ARRAY_TASK_ID="3")
    assert sweep(*SLURM, "--at-once=2", **FOUR) == 0
    assert Path("submitted").read_text() == script
    out = capfd.readouterr().out
    assert "Submitted job 12: 1 x 1 GPUs, 3 runs" in out and f"cml-dist status {here}/study\n" in out
    assert sweep(*SLURM, **{**FOUR, "seeds": 3}) == 0  # 0 and 2 of the array are still in the queue
    assert "runs: 6: 1 finished, 2 in the queue, 3 to begin\n" in capfd.readouterr().out
    assert "#SBATCH --array=0-2\n" in Path("submitted").read_text()


def test_options_of_slurm_are_not_passed_over(here, capfd):
    for words in (("--slurm",), ("--time=60",), ("--dry-run",)):
        assert sweep(*words, **FOUR) == 2
        assert "--slurm and --time go together" in capfd.readouterr().err
