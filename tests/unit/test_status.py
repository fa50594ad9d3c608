"""What ``cml-dist status`` says of a run folder: each state, what is torn or missing, and the exit codes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cml_dist.cli import main
from cml_dist.run.status import RunStatus, now
from cml_dist.telemetry.console import Console
from cml_dist.tools.run_status import RunView

DEAD_PID = 2**22 + 1
"""Above the kernel's largest."""


def lines(path: Path, records: list[dict], torn: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + torn)


def make_run(folder: Path, state: str = "running", *, age_s: float = 0.0, step: int = 60, **status: object) -> Path:
    """The files of a run of 100 steps of half a second with 4 episodes each, last touched ``age_s`` ago."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("train:\n  steps: 100\n")
    said = {"reason": "training", "host": "a1", "pid": 7, "world": 2, "job": "42", "restart": 1, "starts": 2, **status}
    text = RunStatus(state=state, step=step, steps=100, time=now(), started=now(), **said).text()
    (folder / "status.json").write_text(text)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - 40 - age_s))
    sessions = [{"time": "2026-01-01T00:00:00+0000", "step": 0}, {"time": started, "step": 20}]
    lines(folder / "sessions.jsonl", [{**session, "plan": {"processes": 2}} for session in sessions])
    metrics = [
        {"step": n, "loss": 2.0, "accuracy": n / 100, "colearner_accuracy": 0.5, "grad_norm": 1.5, "seconds": 0.5}
        | {"episodes_per_s": 8.0, "skipped": False}
        for n in range(1, step + 1)
    ]
    lines(folder / "metrics.jsonl", metrics, torn='{"step": 99, "lo')
    scored = [{"step": n, "learner": "meta", "mean": m, "ci95": 0.02, "episodes": 9} for n, m in ((20, 0.6), (40, 0.5))]
    lines(folder / "validation.jsonl", scored)
    for name in ("step-00000020.safetensors", "step-00000040.safetensors", "step-00000050.safetensors.damaged"):
        (folder / "checkpoints" / name).touch()
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (time.time() - age_s,) * 2)
    return folder


def check(folder: Path, capfd) -> tuple[int, str]:
    code = main(["status", "--check", str(folder)])
    out, err = capfd.readouterr()
    assert err == "" and out.count("\n") == 1
    return code, out


@pytest.mark.parametrize(
    ("made", "state", "code"),
    [
        ({"state": "finished"}, "finished", 0),
        ({"state": "stopped", "reason": "SIGUSR1"}, "stopped", 75),
        ({"state": "failed", "reason": "no\nspace left"}, "failed", 1),
        ({}, "running", 3),
        ({"age_s": 60}, "running", 3),  # on another machine, where nobody can look for its process
        ({"age_s": 600}, "dead", 1),
        ({"age_s": 60, "host": socket.gethostname(), "pid": DEAD_PID}, "dead", 1),
        ({"age_s": 60, "host": socket.gethostname(), "pid": os.getpid()}, "running", 3),
    ],
)
def test_the_state_and_its_exit_code(tmp_path, capfd, made, state, code):
    folder = make_run(tmp_path / "run", **made)
    found, line = check(folder, capfd)
    assert found == code
    assert line.startswith(f"{folder}: {state}, step 60/100")
    assert made.get("reason", "").replace("\n", " ") in line


def test_figures_are_those_of_the_files(tmp_path, capfd):
    folder = make_run(tmp_path / "run")
    assert main(["status", "--json", str(folder)]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["step"], found["steps"], found["state"]) == (60, 100, "running")
    assert (found["recent"]["seconds"], found["episodes_per_s"]) == (pytest.approx(0.5), pytest.approx(8))
    # 40 steps of this start in 40 s, with its validations: 40 s for the 40 that are left.
    assert found["left_s"] == pytest.approx(40, abs=2)
    assert found["last"]["step"] == 60
    assert found["recent"]["accuracy"] == pytest.approx(sum(range(11, 61)) / 5000)
    assert (found["best"]["step"], found["validated"]["step"], found["validations"]) == (20, 40, 2)
    assert (found["starts"], found["restart"], found["world"], found["job"]) == (2, 1, 2, "42")
    assert found["checkpoint"] == 40


@pytest.mark.parametrize("file", ["eval.json", "evals/own.json"])  # the latter in runs of earlier versions
def test_a_person_sees_all_of_it_within_100_columns(tmp_path, file):
    folder = make_run(tmp_path / "run", "finished", step=100, exit_s=1.25)
    scored = {"mean": 0.5123, "ci95": 0.01}
    test = {"meta": scored, "co": scored, "score": "accuracy", "split": "test", "step": 20}
    (folder / "evals").mkdir()
    (folder / "eval.json").write_text("{}")
    (folder / file).write_text(json.dumps(test))
    rows = RunView(folder).rows()
    assert rows["step"] == "100 of 100, 100.0 %"
    assert rows["last 50 steps"] == "loss 2.000, accuracy 75.5 %, co-learner 50.0 %, 8.00 episodes/s"
    assert rows["diagnostics"] == "gradient norm 1.50"
    assert rows["validations"] == "2, last 50.0 % ± 2.0 % at step 40; best 60.0 % ± 2.0 % at step 20"
    assert rows["processes"] == "2, rank 0 is pid 7 on a1, job 42"
    assert rows["starts"].startswith("2, the last ") and rows["starts"].endswith("; restart 1 of its job")
    assert rows["test"].startswith("test split, step 20: meta-learner 51.23 % ± 1.00 %")
    assert rows["safe exit"] == "within 1.2 s of a signal, so far"
    assert "time left" not in rows
    with open(tmp_path / "screen", "w+") as file:
        Console(file, width=100, interactive=True).header("runs/a", rows)
        file.seek(0)
        assert len(file.read().splitlines()) == len(rows) + 2, "a row is folded"


def test_an_mse_is_best_where_it_is_smallest(tmp_path):
    folder = make_run(tmp_path / "run")
    lines(folder / "metrics.jsonl", [{"step": 1, "loss": 2.0, "mse": 1.0}])
    assert RunView(folder).data["best"]["step"] == 40


@pytest.mark.parametrize("file", ["status.json", "metrics.jsonl", "validation.jsonl", "sessions.jsonl"])
@pytest.mark.parametrize("content", ["", "{", "null\n", '{"step": 1}\n'])
def test_torn_and_odd_files_are_passed_over(tmp_path, capfd, file, content):
    folder = make_run(tmp_path / "run")
    (folder / file).write_text(content)
    assert main(["status", str(folder)]) == 0
    out, err = capfd.readouterr()
    assert err == "" and "checkpoint: step 40" in out
    assert ("state: unknown" if file == "status.json" else "state: running") in out


def test_where_no_run_is_one_line_says_so(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    nothing = "no run has begun here: it has no status.json"
    assert check(tmp_path / "empty", capfd) == (3, f"{tmp_path}/empty: unknown ({nothing})\n")
    assert check(tmp_path / "none", capfd) == (3, f"{tmp_path}/none: unknown (there is no such folder)\n")
    assert main(["status", str(tmp_path / "none")]) == 1
    assert capfd.readouterr().err.startswith(f"error: there is no folder {tmp_path}/none; name")


def test_a_sweep_is_a_table_and_its_worst_run_counts(tmp_path, capfd):
    made = {"a": {"state": "finished"}, "b": {"state": "stopped", "reason": "SIGTERM"}, "c": {"age_s": 600}}
    folders = [str(make_run(tmp_path / name, **how)) for name, how in made.items()]
    assert main(["status", *folders]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0] == str(tmp_path)
    assert [[line.split()[2] for line in out if line.startswith(f"{name} ")] for name in made] == [
        ["finished"],
        ["stopped"],
        ["dead"],
    ]
    assert max(map(len, out)) <= 100 and "b: stopped, SIGTERM" in out
    codes = [main(["status", "--check", *folders[:n]]) for n in (1, 2, 3)]
    assert codes == [0, 75, 1]


def test_the_runs_below_a_folder_are_a_table(tmp_path, capfd, monkeypatch):
    """Nested ones too, and a run's own folders are no runs."""
    (tmp_path / "notes").mkdir()
    make_run(tmp_path / "sweep" / "lr" / "1e-3", "finished")
    make_run(tmp_path / "sweep" / "lr" / "1e-2", "failed", reason="NaN")
    make_run(make_run(tmp_path / "first") / "split-000")
    (tmp_path / "link").symlink_to(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    for named, runs in ((".", ["first", "sweep/lr/1e-2", "sweep/lr/1e-3"]), ("sweep", ["lr/1e-2", "lr/1e-3"])):
        assert main(["status", named]) == 0
        out = capfd.readouterr().out.splitlines()
        assert [line.split()[0] for line in out if " 60 " in line] == runs
        assert main(["status", named, "--json"]) == 0
        found = [run["run_dir"] for run in json.loads(capfd.readouterr().out)]
        assert [Path(run).relative_to(named).as_posix() for run in found] == runs
        assert main(["status", named, "--check"]) == 1
        assert capfd.readouterr().out.count("\n") == len(runs)
    assert main(["status", str(tmp_path / "sweep/lr/1e-2"), str(tmp_path / "first")]) == 0
    assert main(["status", "notes"]) == 1
    assert capfd.readouterr().err == (
        "error: no run has begun in notes, nor below it; name the run.dir of a training run\n"
    )
    assert main(["status", "first", "notes"]) == 1


def test_watching_ends_with_the_run(tmp_path, capfd):
    assert main(["status", str(make_run(tmp_path / "run", "finished")), "--watch", "0.1"]) == 0
    assert main(["status", str(tmp_path / "run"), "--watch", "--check"]) == 2
    assert main(["status", str(tmp_path / "run"), "--json", "--check"]) == 2
    with pytest.raises(SystemExit):
        main(["status", "--watch", str(tmp_path)])
    assert "argument --watch: invalid float value" in capfd.readouterr().err


def test_the_check_imports_no_torch(tmp_path):
    folder = make_run(tmp_path / "run")
    code = f"import sys; from cml_dist.cli import main; main(['status', '--check', {str(folder)!r}])"
    probe = f"{code}; print([name for name in ('torch', 'accelerate', 'numpy') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=600)
    assert run.stdout.splitlines()[1:] == ["[]"], run.stderr
