"""A scheduler's signal that does not stop coming: a real process, from its first import to its last breath."""

from __future__ import annotations

import signal

import pytest
from launching import finish, start, until

from cml_dist.run.status import read_status

SETTINGS = ("domain.shots=5", "domain.queries=5", "model.hidden=[8,8]", "parallel.threads=1", "train.steps=100000")


@pytest.mark.parametrize("trains", [True, False])
def test_a_lone_process_leaves_with_75_however_often_it_is_told(tmp_path, trains):
    folder = tmp_path / "run"
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited, as under a batch script
    try:
        process = start(1, "-m", "cml_dist", "train", "sinusoid", f"run.dir={folder}", *SETTINGS)
    finally:
        signal.signal(signal.SIGUSR1, before)
    metrics = folder / "metrics.jsonl"
    until(lambda: not trains or (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3))

    def tell() -> bool:
        process.send_signal(signal.SIGUSR1)
        return process.poll() is not None

    until(tell, every_s=0.002)
    out = finish(process)
    assert process.returncode == 75, out
    assert "Traceback" not in out and ("everything is saved" if trains else "before training began") in out
    if trains:
        assert read_status(folder / "status.json").state == "stopped"
