"""Saving is collective: whatever befalls rank 0's file or another rank's gathering, nobody waits for ever."""

from __future__ import annotations

import os
from pathlib import Path

from launching import run_ranks

WORKER = str(Path(__file__).with_name("save_worker.py"))
ONE, TWO = "step-00000001.safetensors", "step-00000002.safetensors"


def test_gathered_tensors_arrive_and_a_full_disk_on_rank_0_is_heard_by_all(tmp_path):
    code, out = run_ranks(2, WORKER, str(tmp_path), "disk")
    assert code == 0, out
    for rank in (0, 1):
        assert f"rank {rank} of 2 heard: cannot save {tmp_path / TWO}: File too large" in out, out
        assert f"rank {rank} of 2 reads step 1" in out, out
    assert os.listdir(tmp_path) == [ONE]
    assert (tmp_path / ONE).stat().st_size > 8e6


def test_a_fault_in_the_gathering_of_one_rank_ends_all(tmp_path):
    # The group's own time-out is 10 s; starting takes the rest.
    code, out = run_ranks(2, WORKER, str(tmp_path), "gather")
    assert code != 0
    assert "a fault of ours" in out and "reads step" not in out, out
    assert not (tmp_path / TWO).exists()
