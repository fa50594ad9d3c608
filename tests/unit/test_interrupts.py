"""Signals: at once before there is something to lose, patient after, and never twice."""

from __future__ import annotations

import os
import signal

import pytest

from cml_dist.run.interrupts import Interrupts, Stopped


def send(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


def test_a_signal_before_the_loop_ends_the_run_at_once():
    before = signal.getsignal(signal.SIGUSR1)
    with Interrupts() as interrupts:
        with pytest.raises(Stopped):
            send("SIGUSR1")
        assert interrupts.stop == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_ctrl_c_before_the_loop_is_an_interrupt():
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        send("SIGINT")


def test_later_signals_only_say_so_and_the_first_counts():
    with Interrupts(("SIGUSR2", "SIGTERM")) as interrupts:
        interrupts.patient()
        assert interrupts.stop is None and interrupts.seconds == 0
        for name in ("SIGUSR2", "SIGTERM", "SIGUSR2"):
            send(name)
        assert interrupts.stop == "SIGUSR2"
        assert interrupts.seconds > 0


def test_a_second_ctrl_c_interrupts_unless_a_launcher_passes_it_on(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with Interrupts() as interrupts:
        interrupts.patient()
        send("SIGINT")
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with Interrupts() as interrupts:
        interrupts.patient()
        send("SIGINT")
        send("SIGINT")
        assert interrupts.stop == "SIGINT"


def test_a_signal_in_the_middle_of_imports_waits_for_their_end():
    with Interrupts() as interrupts, pytest.raises(Stopped):
        with interrupts.held():
            signal.raise_signal(signal.SIGUSR1)
            reached = True
        raise AssertionError("it went on")
    assert reached and interrupts.cut_short


def test_only_a_stopped_run_is_deaf_on_its_way_out():
    with Interrupts() as interrupts:
        interrupts.deafen()
        assert callable(signal.getsignal(signal.SIGUSR1))
        interrupts.patient()
        signal.raise_signal(signal.SIGUSR1)
        interrupts.deafen()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    assert not interrupts.cut_short
