"""cml-dist doctor on real processes: the ring, the shared folder, and who deviates."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from launching import run

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
    code, out = run(2, "-m", "cml_dist", "doctor", "sinusoid", f"run.dir={tmp_path / 'run'}", *SETTINGS)
    assert code == 0, out
    assert out.count("cml-dist doctor") == 1 and out.count("\nReady") == 1, out
    assert "ok       processes: 2, all came: 2 on " in out
    assert "MB/s, latency " in out and "(ranks 0 and 1 on " in out
    assert "ok       all-reduce: 64 MiB over 2 ranks in " in out and "sum right; a meta-gradient (" in out
    assert "ok       same folder: all 2 ranks read what rank 0 wrote" in out
    assert "ok       locks between ranks: a lock of rank 0 keeps the others out" in out
    assert "ok       second derivative: right for mlp" in out
    assert "Traceback" not in out and "Warning" not in out
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind, and makes no run folder"


def test_a_rank_that_deviates_is_named(tmp_path):
    """Another version of torch, and another folder under the same relative name."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = ("doctor", *SETTINGS, "run.dir=relative", "--json")
    code, out = run(2, WORKER, *arguments, FAULT="deviant", ELSEWHERE=str(elsewhere))
    assert code == 1, out
    found = findings(out)
    same, deviant = found["torch"]
    assert same["verdict"] == "ok" and same["ranks"] == [0]
    assert deviant["verdict"] == "warning" and deviant["who"].startswith("rank 1 on ")
    assert deviant["value"] == f"2.6.1 instead of {importlib.metadata.version('torch')}"
    (folder,) = found["same folder"]
    assert folder["verdict"] == "fault" and f"it is not in {elsewhere} there" in folder["value"]
    assert "rank 1 on " in folder["value"] and "all machines share" in folder["remedy"]
    (pairs,) = (row for check, (row, *_) in found.items() if check.startswith("gloo"))
    assert pairs["data"]["pairs"][0]["mb_per_s"] > 1, "the fault of one check hid another"


def test_a_ring_that_hangs_is_said_and_not_suffered(tmp_path):
    code, out = run(2, WORKER, "doctor", *SETTINGS, f"run.dir={tmp_path}", "--json", timeout_s=100, FAULT="hang")
    assert code == 1, out
    found = findings(out)
    (ring,) = found["ring"]
    assert ring["verdict"] == "fault" and "did not end within 4 s" in ring["value"]
    assert "ranks 0 and 1 on" in ring["value"] and "in the all-reduce" in ring["value"]
    assert found["same folder"][0]["verdict"] == "ok" and found["fsync"][0]["verdict"] == "ok"


def test_a_rank_that_does_not_come_is_named(tmp_path):
    code, out = run(2, WORKER, "doctor", *SETTINGS, f"run.dir={tmp_path}", timeout_s=100, FAULT="absent")
    assert code == 1, out
    assert "fault    processes: rank 1 of 2 did not come within 6 s" in out
    assert "\nNot ready: 1 fault" in out and "  1. processes: rank 1 of 2 did not come" in out


def test_what_was_found_is_shown_where_another_rank_is_killed(tmp_path):
    code, out = run(2, WORKER, "doctor", *SETTINGS, f"run.dir={tmp_path}", timeout_s=100, FAULT="killed")
    assert code == 1, out
    assert "  ok       processes: 2, all came" in out and out.count("\nNot ready: 1 fault") == 1, out
    assert "  1. world: rank 1 (host " in out and "ended without a word" in out, out
