"""Logs of all ranks, trackers and ``cml-dist status`` over a run of two processes that fails and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import run_ranks
from test_train import FAULTY, command
from tracked import tensorboard_scalars, wandb_history, wandb_records

from cml_dist.cli import main
from cml_dist.telemetry.metrics import read_metrics

TRACKED = ("checkpoint.every=3", "run.trackers=[tensorboard, wandb]")


@pytest.fixture(scope="module")
def failed_and_resumed(tmp_path_factory):
    """(folder, output of the failure, check after it, output of the resumed run)."""
    folder = tmp_path_factory.mktemp("watching") / "run"
    # The fifth meta-step fails on rank 1: the fourth was shown, but the checkpoint is of the third.
    code, failed = run_ranks(2, FAULTY, *command(folder, *TRACKED), FAULT="data", WANDB_MODE="offline")
    assert code != 0 and 'cml_dist/cli.py", line' not in failed, "a traceback of ours beside the clear line"
    check = main(["status", "--check", str(folder)])
    code, resumed = run_ranks(2, FAULTY, *command(folder, *TRACKED), FAULT="warned", WANDB_MODE="offline")
    assert code == 0, resumed
    return folder, failed, check, resumed


def logs_of(folder: Path) -> list[str]:
    files = sorted((folder / "logs").iterdir())
    assert [file.name for file in files] == ["rank-00000.log", "rank-00001.log"]
    return [file.read_text() for file in files]


def test_each_rank_has_a_log_of_all_starts(failed_and_resumed):
    folder, *_ = failed_and_resumed
    for rank, log in enumerate(logs_of(folder)):
        starts = [line for line in log.splitlines() if "--------" in line]
        assert len(starts) == 2 and all(f"rank {rank} of 2" in line for line in starts)
        assert "Resuming at step 3 of 20" in log
        assert "step 20/20  loss" in log


def test_what_befell_the_world_is_in_every_log(failed_and_resumed):
    folder, *_ = failed_and_resumed
    assert "\nerror: rank 1 (host " in logs_of(folder)[0]


def test_an_error_is_in_its_ranks_log_with_its_traceback_and_on_screen(failed_and_resumed):
    folder, failed, *_ = failed_and_resumed
    log = logs_of(folder)[1]
    assert "ERROR   DataError: image x.png in shard train-000003.tar cannot be decoded; pack the set again" in log
    assert "in faulty_episode" in log
    assert "error: rank 1: image x.png in shard train-000003.tar cannot be decoded; pack the set again" in failed


def test_other_ranks_warnings_are_in_their_logs_alone(failed_and_resumed):
    folder, _, _, resumed = failed_and_resumed
    for rank, log in enumerate(logs_of(folder)):
        assert f"warning on rank {rank}" in log and f"warning on rank {1 - rank}" not in log
    assert "warning on rank 0" in resumed and "warning on rank 1" not in resumed


def test_trackers_show_one_curve_without_a_trace(failed_and_resumed):
    folder, *_ = failed_and_resumed
    lines = read_metrics(folder / "metrics.jsonl")
    shown = tensorboard_scalars(folder / "tensorboard")
    for key in ("loss", "mse", "grad_norm", "lr", "episodes_per_s"):
        assert shown[f"train/{key}"] == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]
    validations = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert shown["validation/mse"] == [(line["step"], pytest.approx(line["mean"])) for line in validations]
    report = json.loads((folder / "eval.json").read_text())
    assert shown["test/colearner_mse_ci95"] == [(20, pytest.approx(report["co"]["ci95"]))]

    sessions = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2 and len({session.name.split("-")[-1] for session in sessions}) == 1
    first, second = (wandb_history(session) for session in sessions)
    # The heartbeat ended rank 0 at once, and W&B has kept some of four steps; the checkpoint is of the third.
    assert [row["step"] for row in first if "train/loss" in row] in [list(range(1, n)) for n in range(1, 6)]
    assert [row["step"] for row in second if "train/loss" in row] == list(range(4, 21))
    known = {line["step"]: line["loss"] for line in lines}
    losses = [(row["step"], row["train/loss"]) for row in [*first, *second] if "train/loss" in row]
    assert all(loss == pytest.approx(known[step], rel=1e-9) for step, loss in losses)
    assert [folder.name for folder in (folder / "tensorboard").glob("*/hparams.yml")] == ["hparams.yml"]
    settings = [u.key or u.nested_key[0] for r in wandb_records(sessions[1]) for u in r.config.update]
    assert "optim.lr" in settings


def test_the_status_tells_of_it(failed_and_resumed, capfd):
    folder, _, check, _ = failed_and_resumed
    assert check == 1
    assert main(["status", "--check", str(folder)]) == 0
    assert main(["status", str(folder)]) == 0
    out = capfd.readouterr().out
    assert "state: finished" in out and "starts: 2, " in out and "processes: 2, rank 0" in out
    assert f"logs: {folder / 'logs'}" in out and "test: test split, step" in out
