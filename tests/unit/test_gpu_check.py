"""``make gpu-check`` works: all but the GPU itself, with tiny networks on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import gpu_check
import pytest
import torch


def check(*words):
    command = [sys.executable, gpu_check.__file__, "--device", "cpu", "--small", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_both_tables_and_parity_in_float64(tmp_path):
    done = check("--out", str(tmp_path / "out.json"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    ways = {}
    for row in found["rows"]:
        assert f" {row['way']} " in done.stdout
        ways.setdefault(row["backbone"], {})[row["way"]] = row
    ours = {"plain", "ours, graph", "ours, adjoint", "ours, compiled"}
    own = {"conv4": "plain, episodes batched", "test_resnet": "plain", "test_vit": "ours, adjoint, lean"}
    for backbone, more in own.items():
        measured = ways[backbone]
        assert measured.keys() == ours | {more}
        assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in measured.values())
        assert measured["plain"]["error"] is None
        assert all(row["error"] < 1e-9 for way, row in measured.items() if way != "plain")
    (largest,) = found["largest"]
    assert largest["backbone"] == "test_vit" and largest["note"] == "fits" and largest["images"] == 10
    assert "The largest ViT" in done.stdout and "Conv-4, the fastest of ours" in done.stdout


def test_what_the_time_does_not_allow_is_said():
    done = check("--minutes", "0.1", "--only", "conv4")
    assert done.returncode == 0
    assert "all" in done.stdout and "left out: 0.1 minutes were over" in done.stdout


def test_a_way_without_memory_or_with_a_fault_is_a_row_and_the_others_go_on(monkeypatch):
    def raising(error):
        def way(case, net):
            def run(params, episodes):
                raise error

            return run

        return way

    plain = gpu_check.CONTENDERS["plain"]
    full, broken = raising(torch.OutOfMemoryError("no")), raising(ValueError("this\nand that"))
    monkeypatch.setattr(gpu_check, "CONTENDERS", {"full": full, "broken": broken, "plain": plain})
    rows = list(gpu_check.measure(gpu_check.Case("conv4", 16, 1), torch.device("cpu"), True))
    assert rows[0] == {"way": "full", "note": "out of memory"}
    assert rows[1] == {"way": "broken", "note": "ValueError: this", "failed": True}
    assert rows[2]["seconds"] > 0


@pytest.mark.parametrize(
    ("answers", "tried"),
    [
        ({("a", 25): "out of memory", ("a", 5): ""}, ["a 25 out of memory", "a 5 fits"]),
        ({("a", 25): "took longer than 9 s", ("b", 25): ""}, ["a 25 took longer than 9 s", "b 25 fits"]),
    ],
)
def test_the_largest_that_fits_is_the_last_that_is_tried(monkeypatch, answers, tried):
    clock = gpu_check.Clock(10)

    def answer(words):
        said = answers[words[-2], int(words[-1])]
        return ([{"note": said}], "") if said.startswith("out") else ([] if said else [{"parameters": 1}], said)

    monkeypatch.setattr(clock, "in_fresh_process", answer)
    rows = gpu_check.largest(clock, [], ["a", "b"], lambda line: None)
    assert [f"{row['backbone']} {row['micro_batch']} {row['note']}" for row in rows] == tried
