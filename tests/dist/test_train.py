"""The command line on real processes: the same run on one and on two, stop and resume, and every rank down on a fault."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from launching import children, finish, run, run_ranks, start, start_ranks, until

from cml_dist.run.status import read_status
from cml_dist.telemetry.metrics import read_metrics

FAULTY = str(Path(__file__).with_name("faulty_worker.py"))
SETTINGS = (
    "domain.shots=5", "domain.queries=5", "model.hidden=[8, 8]", "method.inner_steps=2", "engine.name=graph",
    "train.steps=20", "train.episodes_per_step=3", "eval.every=10", "eval.val_episodes=5", "eval.episodes=7", "checkpoint.every=10",
    "run.precision=fp64", "optim.name=sgd", "run.log_every=5", "parallel.threads=1",
)  # fmt: skip
BARE = ("eval.every=0", "eval.final=false", "checkpoint.every=100000")
TIMES = ("seconds", "episodes_per_s", "peak_memory_gib")


def command(folder: Path, *overrides: str) -> tuple[str, ...]:
    return ("train", "sinusoid", f"run.dir={folder}", *SETTINGS, *overrides)


def lines(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """A run of two processes that nothing disturbed, and what it printed.

    A success, though each interpreter aborts on its way down, as torch's gloo threads make it do now and then.
    """
    folder = tmp_path_factory.mktemp("two") / "run"
    code, out = run(2, FAULTY, *command(folder), FAULT="teardown")
    assert code == 0, out
    return folder, out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The lines of a longer run of two processes: under the constant schedule a run's length changes no step."""
    folder = tmp_path_factory.mktemp("long") / "run"
    code, out = run_ranks(2, "-m", "cml_dist", *command(folder, "train.steps=300", *BARE))
    assert code == 0, out
    return lines(folder)


def test_two_processes_train_as_one(on_two, tmp_path):
    code, out = run_ranks(1, "-m", "cml_dist", *command(tmp_path / "one"))
    assert code == 0, out
    for one, two in zip(lines(tmp_path / "one"), lines(on_two[0]), strict=True):
        assert one.keys() == two.keys()
        for key in one:
            expected = two[key] if two[key] is None else pytest.approx(two[key], rel=1e-9)
            assert one[key] == expected, (one["step"], key)
    reports = [json.loads((folder / "eval.json").read_text()) for folder in (tmp_path / "one", on_two[0])]
    for learner in ("meta", "co"):
        assert reports[0][learner]["mean"] == pytest.approx(reports[1][learner]["mean"], rel=1e-9)
        assert reports[0][learner]["episodes"] == reports[1][learner]["episodes"] == 7


def test_two_processes_test_again_as_one_and_draw_one_picture(on_two, tmp_path):
    folder, picture = tmp_path / "run", tmp_path / "fits.png"
    shutil.copytree(on_two[0], folder)
    before = json.loads((folder / "eval.json").read_text())
    code, out = run_ranks(2, "-m", "cml_dist", "eval", str(folder), "--plot", str(picture))
    assert code == 0 and out.count("Picture") == 1, out
    assert json.loads((folder / "eval.json").read_text()) == before and "grid" in before["untrained"]["co"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_environment_variable_changes_a_result(on_two, tmp_path):
    meddling = {
        "OMP_NUM_THREADS": "2",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    }
    ranks = start_ranks(2, "-m", "cml_dist", *command(tmp_path / "run"), **meddling)  # OpenMP reads it as it is loaded
    said = [finish(rank) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert lines(tmp_path / "run") == lines(on_two[0])


def test_rank_0_alone_speaks(on_two):
    folder, out = on_two
    assert "2 processes (ddp), 3 episodes a meta-step: 2 or 1 a process" in out
    assert out.count("step 20/20") == 1
    assert out.count("Run folder") == 1
    assert "Traceback" not in out and "Warning" not in out


def test_interrupt_saves_and_resume_is_exact(undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = start(2, "-m", "cml_dist", *command(folder, "train.steps=100000", *BARE))
    metrics = folder / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= 5)
    process.send_signal(signal.SIGINT)
    out = finish(process)
    assert process.returncode != 0
    assert "everything is saved" in out and "Run the same command again" in out, out
    stopped_at = len(lines(folder))
    code, out = run_ranks(2, "-m", "cml_dist", *command(folder, f"train.steps={stopped_at + 5}", *BARE))
    assert code == 0, out
    assert f"Resuming at step {stopped_at}" in out
    assert stopped_at + 5 <= len(undisturbed) and lines(folder) == undisturbed[: stopped_at + 5]


def test_a_schedulers_signal_saves_whatever_else_comes_and_resume_is_exact(undisturbed, tmp_path):
    """SIGUSR1 to one rank alone, then a storm on both and their loaders: every signal after the first is one too many."""
    folder = tmp_path / "run"
    process = start(2, "-m", "cml_dist", *command(folder, "train.steps=100000", "domain.workers=1", *BARE))
    until(lambda: (folder / "metrics.jsonl").is_file() and len(lines(folder)) >= 5)
    ranks = children(process.pid)
    everyone = [*ranks, *(loader for rank in ranks for loader in children(rank))]
    assert len(everyone) >= 4
    os.kill(ranks[1], signal.SIGUSR1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        for pid in everyone:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.01)
    out = finish(process)
    assert process.returncode != 0
    status = read_status(folder / "status.json")
    assert status.state == "stopped" and status.reason in ("SIGUSR1", "SIGTERM"), status
    assert f"Stopped by {status.reason} after step {status.step} of 100000" in out, out
    assert "Traceback" not in out.split("ChildFailedError")[0].split("torch/distributed")[0], out
    assert len(lines(folder)) == status.step
    code, out = run_ranks(2, "-m", "cml_dist", *command(folder, f"train.steps={status.step + 3}", *BARE))
    assert code == 0 and f"Resuming at step {status.step}" in out, out
    assert status.step + 3 <= len(undisturbed) and lines(folder) == undisturbed[: status.step + 3]


@pytest.mark.slow  # the same before training began: the next test
def test_a_stopped_run_is_not_restarted_by_a_launcher_that_may(tmp_path):
    folder = tmp_path / "run"
    long = ("train.steps=100000", "eval.every=0")
    process = start(2, "--max_restarts=3", "-m", "cml_dist", *command(folder, *long))
    until(lambda: (folder / "metrics.jsonl").is_file() and len(lines(folder)) >= 2)
    os.kill(children(process.pid)[0], signal.SIGUSR1)
    out = finish(process)
    assert process.returncode == 0, out
    assert read_status(folder / "status.json").state == "stopped"
    assert out.count("Stopped by SIGUSR1") == 1


def test_a_signal_that_reached_one_rank_before_training_began_stops_all_for_good(tmp_path):
    """The others find out from the heartbeat alone, and their end must not look like a fault to the launcher."""
    code, out = run(2, "--max_restarts=3", FAULTY, *command(tmp_path / "run"), FAULT="asked to stop")
    assert code == 0 and "in place" not in out, out
    assert "left: it was stopped by SIGUSR1 before training began" in out, out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("setup", "error: shard train-000003.tar is missing; copy it to this machine"),
        ("bug", "RuntimeError: a fault of ours"),
        ("killed", ""),
    ],
)
def test_a_fault_on_one_rank_ends_all(on_two, tmp_path, fault, words):
    """Unreadable data: test_watching.py."""
    folder = tmp_path / "run"
    how = run if fault == "killed" else run_ranks
    code, out = how(2, FAULTY, *command(folder, "checkpoint.every=2"), FAULT=fault)
    assert code != 0, out
    assert words in out, out
    if fault == "setup":
        assert 'cml_dist/cli.py", line' not in out, "a traceback of ours beside the clear line"
    if fault != "setup":
        code, out = run_ranks(2, FAULTY, *command(folder, "checkpoint.every=2"), FAULT="")
        assert code == 0 and "Resuming at step" in out, out
        assert lines(folder) == lines(on_two[0])


def test_a_nan_on_one_rank_is_skipped_by_all(tmp_path):
    folder = tmp_path / "run"
    code, out = run_ranks(2, FAULTY, *command(folder), FAULT="nan")
    assert code == 0, out
    assert [line["step"] for line in lines(folder) if line["skipped"]] == [3]
    assert lines(folder)[-1]["loss"] is not None


def test_another_world_than_asked_for_is_refused(tmp_path):
    code, out = run(2, "-m", "cml_dist", *command(tmp_path / "run", "parallel.processes=4"))
    assert code != 0
    assert "error: parallel.processes asks for 4 processes, but the world has 2" in out
    assert out.count("error: ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # the rule: test_env.py
def test_a_launcher_that_starts_one_process_of_two_is_refused(tmp_path):
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2")
    code, out = run(1, *launch, "-m", "cml_dist", *command(tmp_path / "run"), HF_HOME=str(tmp_path))
    assert code != 0
    assert "error: several processes were asked for, but accelerate launch started one" in out, out
    assert "launch/accelerate/cpu.yaml" in out
    assert not (tmp_path / "run").exists()


def test_a_restart_in_place_leaves_no_trace_in_the_curve(on_two, tmp_path):
    folder = tmp_path / "run"
    process = start(2, "--max_restarts=2", FAULTY, *command(folder, "checkpoint.every=3"), FAULT="killed")
    out = finish(process)
    assert process.returncode == 0, out
    assert "the launcher starts all again from the last checkpoint (restart 1 of 2)" in out, out
    assert "Restart 1 of 2 in place" in out and "Resuming at step 3 of 20" in out, out
    assert lines(folder) == lines(on_two[0])
    reports = [json.loads((path / "eval.json").read_text()) for path in (folder, on_two[0])]
    assert reports[0]["meta"] == reports[1]["meta"] and reports[0]["co"] == reports[1]["co"]
    status = read_status(folder / "status.json")
    assert (status.state, status.restart, status.starts) == ("finished", 1, 2)
