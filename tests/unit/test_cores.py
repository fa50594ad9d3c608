"""How many cores and threads a process takes: what the user, the affinity and the control groups leave it."""

from __future__ import annotations

import os

import pytest

from cml_dist.data import cores
from cml_dist.data.control_groups import group_settings
from cml_dist.distributed.env import threads_asked
from cml_dist.distributed.world import crowded_cores


def test_cores_are_those_of_the_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= cores.usable_cores() <= len(allowed)


@pytest.mark.parametrize(
    ("groups", "usable"),
    [
        ([["max", "100000"]], 8),
        ([["-1", "100000"]], 8),
        ([["150000", "100000"]], 2),  # rounded up
        ([["max", "100000"], ["400000", "100000"], ["600000", "100000"]], 4),  # of a group above
        ([["10000", "100000"]], 1),
        ([], 8),
    ],
)
def test_cores_are_at_most_the_quota_of_a_control_group(monkeypatch, groups, usable):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "group_settings", lambda *names, unified: iter(groups))
    assert cores.usable_cores() == usable


def test_control_groups_of_this_process_are_read_as_they_are():
    for quota, period in group_settings("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us", unified="cpu.max"):
        assert int(period) > 0 and (quota in ("max", "-1") or int(quota) > 0)


@pytest.mark.parametrize(
    ("word", "threads"), [("3", 3), ("1", 1), ("4,2", 4), ("", None), ("0", None), ("all", None), (None, None)]
)
def test_the_users_omp_num_threads_counts(monkeypatch, word, threads):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert threads_asked({} if word is None else {"OMP_NUM_THREADS": word}) == threads


def test_more_threads_than_cores_are_warned_of_with_what_helps(monkeypatch):
    monkeypatch.setattr("cml_dist.distributed.world.usable_cores", lambda: 4)
    assert crowded_cores(2, 2) is None
    assert crowded_cores(4, 2).startswith("2 processes of 4 threads share 4 cores, so that")
    assert crowded_cores(4, 2).endswith("; set parallel.threads=2")
    assert crowded_cores(1, 8).endswith("; start at most 4")
    assert crowded_cores(8, 8).endswith("; set parallel.threads=1 and start at most 4")
