"""cml-dist doctor on real processes: the world, the shared folder, and who deviates."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from launching import run_ranks, world_of

WORKER = str(Path(__file__).with_name("doctor_worker.py"))
SETTINGS = ("run.device=cpu", "parallel.threads=1")


def findings(out: str) -> dict[str, list[dict]]:
    """The report in what was printed, by check."""
    report = json.loads(out[out.index("{\n") : out.rindex("\n}") + 2])
    found: dict[str, list[dict]] = {}
    for row in report["findings"]:
        found.setdefault(row["check"], []).append(row)
    return found


def test_two_processes_are_measured_and_shown_once(tmp_path):
    code, out = run_ranks(2, "-m", "cml_dist", "doctor", "sinusoid", f"run.dir={tmp_path / 'run'}", *SETTINGS)
    assert code == 0, out
    assert out.count("cml-dist doctor") == 1 and out.count("\nReady") == 1, out
    assert "ok       world: all 2 processes joined by gloo on " in out
    assert "ok       all-reduce: 16 MiB in " in out and "WRONG" not in out
    assert "ok       same folder: the ranks see what rank 0 writes" in out
    assert "ok       locks: flock works" in out
    assert "ok       second derivative: right for mlp" in out
    assert "Traceback" not in out and "Warning" not in out
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind, and makes no run folder"


def test_a_rank_that_deviates_is_named(tmp_path):
    """Another version of torch, and another folder under the same relative name."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = ("doctor", *SETTINGS, "run.dir=relative", "--json")
    code, out = run_ranks(2, WORKER, *arguments, FAULT="deviant", ELSEWHERE=str(elsewhere))
    assert code == 1, out
    found = findings(out)
    same, deviant = found["torch"]
    assert same["verdict"] == "ok" and same["ranks"] == [0]
    assert deviant["verdict"] == "warning" and deviant["who"].startswith("rank 1 on ")
    torch = importlib.metadata.version("torch")
    assert deviant["value"] == f"2.6.1 (needs >=2.6) instead of {torch} (needs >=2.6)"
    _, folder = found["same folder"]
    assert folder["verdict"] == "fault" and folder["value"] == f"{elsewhere} is not the folder that rank 0 writes to"
    assert folder["who"].startswith("rank 1 on ") and "all machines share" in folder["remedy"]
    assert "MB/s" in found["all-reduce"][0]["value"], "the fault of one check hid another"


def test_a_rank_that_does_not_come_is_named(tmp_path):
    few = "parallel.join_timeout_s=6"
    first, _ = world_of(2)
    code, out = run_ranks(1, WORKER, "doctor", *SETTINGS, few, f"run.dir={tmp_path}", **first)
    assert code == 1, out
    assert "fault    world: 1 of 2 processes did not come" in out and "  ok       torch: " in out, out
    assert out.count("\nNot ready: 1 fault") == 1, out


def test_a_rank_that_is_killed_is_named(tmp_path):
    code, out = run_ranks(2, WORKER, "doctor", *SETTINGS, f"run.dir={tmp_path}", FAULT="killed")
    assert code == 1, out
    assert "error: rank 1 (host " in out and "ended without a word" in out, out
