"""The watch of a lone process: what hangs is told with its place, what moves or was suspended is left alone."""

from __future__ import annotations

import threading
import time

import pytest

from cml_dist.parallel import alone
from cml_dist.parallel import watch as watches
from cml_dist.parallel.alone import Alone, watched_alone
from cml_dist.parallel.watch import Watch, this_watch


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (alone, watches):
        monkeypatch.setattr(module, "TICK_S", 0.05)


class Ends:
    """What a watch says in the place of ending this process."""

    def __init__(self):
        self.verdicts, self.came = [], threading.Event()

    def __call__(self, verdict, watch, speaks):
        assert speaks
        self.verdicts.append(verdict)
        self.came.set()


def test_only_a_main_thread_that_stands_still_is_ended():
    ends = Ends()
    watch = Alone(1.0, ends)
    until_s = time.monotonic() + 2.5
    while time.monotonic() < until_s:
        watch.touch() if watch._at[0] == "step 3, episode 1 of 2" else watch.beat("step 3, episode 1 of 2")
        time.sleep(0.01)
    assert not ends.verdicts
    assert ends.came.wait(10)
    watch.close()
    (verdict,) = ends.verdicts
    told = f"{watch.me.name} did not move for 1 s in step 3, episode 1 of 2; its threads are shown below"
    assert (verdict.what, verdict.stacks) == (told, True)
    assert verdict.remedy.startswith("mend it, or raise parallel.timeout_s; then run the same command again")
    assert watch.described.startswith(f"{watch.me.name}, in step 3, episode 1 of 2 for ")


def test_a_process_that_was_suspended_does_not_hang(monkeypatch):
    ends, stood = Ends(), threading.Event()

    def stand_still(*_):  # as with SIGSTOP, all threads at once
        if not stood.is_set():
            time.sleep(1.5)
            stood.set()

    monkeypatch.setattr(alone, "guard", stand_still)
    watch = Alone(1.0, ends)
    assert stood.wait(10)
    time.sleep(0.3)
    assert not ends.verdicts
    assert ends.came.wait(10), "it has its own time again"
    watch.close()


def test_nothing_is_watched_once_the_world_is_left_also_by_an_error():
    with pytest.raises(KeyError), watched_alone(100.0):
        watch = this_watch()
        assert isinstance(watch, Alone) and watch._thread.is_alive()
        raise KeyError
    assert not watch._thread.is_alive()
    assert type(this_watch()) is Watch
