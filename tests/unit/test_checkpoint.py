"""Checkpoints are whole or not there, verified, and the older one is there when the newer is damaged."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from cml_dist.errors import CheckpointError
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.checkpoint import Checkpoint


def make(step: int) -> Checkpoint:
    torch.manual_seed(step)
    return Checkpoint(
        step,
        {"body.w": torch.randn(3, 4), "head.b": torch.randn(4, dtype=torch.float64)},
        {"exp_avg/body.w": torch.randn(3, 4), "step/body.w": torch.tensor(float(step))},
        {"best": {"step": 1, "mean": 0.5}, "skipped": 0},
    )


def same(a: Checkpoint, b: Checkpoint) -> bool:
    pairs = [(a.params, b.params), (a.moments, b.moments)]
    return (a.step, a.state) == (b.step, b.state) and all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x) for x, y in pairs
    )


def test_round_trip(tmp_path):
    assert same(checkpoints.load(checkpoints.save(tmp_path, make(7))), make(7))
    assert os.listdir(tmp_path) == ["step-00000007.safetensors"]


def damage_truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def damage_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_empty])
def test_damage_is_found_and_the_previous_one_used(tmp_path, damage):
    checkpoints.save(tmp_path, make(1))
    newer = checkpoints.save(tmp_path, make(2))
    damage(newer)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(newer)
    found, faults = checkpoints.load_newest(tmp_path)
    assert same(found, make(1))
    assert len(faults) == 1 and newer.name in str(faults[0])


def test_nothing_whole_is_an_error_and_not_a_fresh_start(tmp_path):
    damage_truncate(checkpoints.save(tmp_path, make(1)))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.load_newest(tmp_path)
    assert checkpoints.load_newest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch, moment):
    checkpoints.save(tmp_path, make(1))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if moment == "write":
        monkeypatch.setattr(checkpoints, "save_file", full)
    elif moment == "sync":
        monkeypatch.setattr(checkpoints.os, "fsync", full)
    else:
        monkeypatch.setattr(checkpoints.os, "replace", full)
    with pytest.raises(CheckpointError, match=r"No space left.*step 1 stays good"):
        checkpoints.save(tmp_path, make(2))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step-00000001.safetensors"]
    assert same(checkpoints.load_newest(tmp_path)[0], make(1))


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        checkpoints.save(tmp_path, make(step))
    checkpoints.prune(tmp_path, 2, frozenset({3}))
    assert checkpoints.steps_in(tmp_path) == [3, 5, 6]


def test_another_network_is_refused_by_name(tmp_path):
    have = make(1).params
    for want in ({**have, "body.w": torch.zeros(3, 5)}, {"body.w": have["body.w"]}, {**have, "new": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="another network: (body.w|head.b|new)"):
            checkpoints.check_fits(have, want, tmp_path)
    checkpoints.check_fits(have, {n: torch.empty_like(p) for n, p in have.items()}, tmp_path)
