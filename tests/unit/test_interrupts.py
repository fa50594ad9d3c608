"""Signals: at once before there is something to lose, deferred after, and never twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cml_dist.run.interrupts import Interrupts, Stopped


def send(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


def test_a_signal_before_the_loop_ends_the_run_at_once():
    before = signal.getsignal(signal.SIGUSR1)
    with Interrupts() as interrupts:
        interrupts.raise_signals()
        with pytest.raises(Stopped):
            send("SIGUSR1")
        assert interrupts.cut_short
        assert interrupts.stop == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_ctrl_c_before_the_loop_is_an_interrupt():
    with Interrupts() as interrupts:
        interrupts.raise_signals()
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")


def test_ctrl_c_whose_answer_nobody_reads_stops_the_run_all_the_same():
    """As in ``train ... 2>&1 | tee log``: Ctrl-C ends tee too."""
    read, write = os.pipe()
    os.close(read)
    kept = os.dup(2)
    os.dup2(write, 2)
    try:
        with Interrupts() as interrupts:
            interrupts.defer_signals()
            send("SIGINT")
            assert interrupts.stop == "SIGINT"
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(write)


def test_later_signals_only_say_so_and_the_first_counts():
    with Interrupts(("SIGUSR2", "SIGTERM")) as interrupts:
        interrupts.raise_signals()
        interrupts.defer_signals()
        assert interrupts.stop is None
        for name in ("SIGUSR2", "SIGTERM", "SIGUSR2"):
            send(name)
        assert interrupts.stop == "SIGUSR2"


def test_a_second_ctrl_c_interrupts_unless_a_launcher_passes_it_on(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with Interrupts() as interrupts:
        send("SIGINT")
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with Interrupts() as interrupts:
        send("SIGINT")
        send("SIGINT")
        assert interrupts.stop == "SIGINT"


def test_a_signal_in_the_middle_of_imports_ends_the_run_after_them():
    with Interrupts() as interrupts:
        send("SIGUSR1")
        assert not interrupts.cut_short
        with pytest.raises(Stopped):
            interrupts.raise_signals()


def test_only_a_stopped_run_ignores_signals_on_its_way_out():
    with Interrupts() as interrupts:
        interrupts.ignore_signals()
        assert callable(signal.getsignal(signal.SIGUSR1))
        send("SIGUSR1")
        interrupts.ignore_signals()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_who_lets_another_rank_say_the_error_is_ended_by_the_launcher_without_a_word(tmp_path):
    """Two ranks of a machine come to one error before they meet; the launcher ends the second once the first left."""
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    process = subprocess.Popen(
        [sys.executable, "-m", "cml_dist", "train", "sinusoid", "parallel.processes=3", f"run.dir={tmp_path}/run"],
        env=os.environ | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def handles(name: str) -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return bool(int(status.partition("SigCgt:")[2].split()[0], 16) & 1 << signal.Signals[name] - 1)

    try:
        end_s = time.monotonic() + 600
        while handles("SIGTERM") or not handles("SIGUSR1"):  # of the two that it was ready for, one is given up
            assert time.monotonic() < end_s and process.poll() is None
            time.sleep(0.01)
        process.terminate()
        out, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert (process.returncode, out) == (-signal.SIGTERM, "")
