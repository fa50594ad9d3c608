"""Checkpoints are whole or not there, verified, and written and read with one tensor in memory."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from cml_dist.distributed.strategy import DataParallel
from cml_dist.distributed.world import World
from cml_dist.errors import CheckpointError
from cml_dist.run import checkpoint as checkpoints

ALONE = World(accelerator=None, rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
STATE = {"best": {"step": 1, "mean": 0.5}, "skipped": 0}


def make(step):
    """What a strategy might save at a step."""
    torch.manual_seed(step)
    return {
        "param/body.w": torch.randn(3, 4),
        "param/head.b": torch.randn(4, dtype=torch.float64),
        "moment/exp_avg/body.w": torch.randn(3, 4),
        "moment/step/body.w": torch.tensor(float(step)),
    }


def layout_of(tensors):
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def save(folder, step, tensors=None):
    tensors = tensors or make(step)
    return checkpoints.save(ALONE, folder, step, STATE, layout_of(tensors), iter(tensors.items()))


def holds(checkpoint, step, tensors):
    return (
        (checkpoint.step, checkpoint.state) == (step, STATE)
        and checkpoint.layout == layout_of(tensors)
        and all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    )


def test_round_trip(tmp_path):
    found = checkpoints.load(save(tmp_path, 7))
    assert holds(found, 7, make(7))
    assert os.listdir(tmp_path) == ["step-00000007.safetensors"]
    assert found.params().keys() == {"body.w", "head.b"}
    assert found.params(["head.b"]).keys() == {"head.b"}
    assert safetensors.torch.load_file(found.path).keys() == make(7).keys()


def test_the_order_in_which_tensors_come_leaves_no_trace(tmp_path):
    """One strategy may gather in another order than the next: the file is the same."""
    first = save(tmp_path / "a", 7).read_bytes()
    assert save(tmp_path / "b", 7, dict(reversed(make(7).items()))).read_bytes() == first


def test_files_of_format_1_are_read(tmp_path):
    """With metadata, and so a SHA-256, as the code of format 1 wrote them."""
    tensors = {
        "param/body.w": torch.arange(3.0),
        "param/head.b": torch.tensor([0.5], dtype=torch.float64),
        "moment/exp_avg/body.w": torch.arange(3.0) / 4,
        "moment/step/body.w": torch.tensor(7.0),
    }
    meta = (
        '{"format": 1, "step": 7, "state": {"best": null, "skipped": 0}, '
        '"sha256": "f8f05c1eda5015fb199c09189a55aa06538ea58622c12205cb3fbdb7050cc905"}'
    )
    path = checkpoints.path_of(tmp_path, 7)
    safetensors.torch.save_file(tensors, path, {"cml_dist": meta})
    found = checkpoints.load(path)
    assert found.state == {"best": None, "skipped": 0}
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())
    tensors["param/body.w"][1] = 3.0
    safetensors.torch.save_file(tensors, path, {"cml_dist": meta})
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(path)


def test_other_formats_are_refused(tmp_path):
    path = checkpoints.path_of(tmp_path, 7)
    safetensors.torch.save_file(make(7), path, {"cml_dist": '{"format": 3, "step": 7, "state": {}}'})
    with pytest.raises(CheckpointError, match="has format 3"):
        checkpoints.load(path)


def damage_truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damage_empty(path):
    path.write_bytes(b"")


def damage_state(path):
    path.write_bytes(path.read_bytes().replace(b'\\"skipped\\": 0', b'\\"skipped\\": 1'))


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_state])
def test_damage_is_found_and_the_previous_one_used(tmp_path, damage):
    save(tmp_path, 1)
    newer = save(tmp_path, 2)
    damage(newer)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(newer)
    warnings = []
    assert holds(checkpoints.load_newest(tmp_path, warnings.append), 1, make(1))
    assert len(warnings) == 1 and newer.name in warnings[0] and "the one before it is used" in warnings[0]


def test_every_flipped_bit_is_found(tmp_path):
    """One of each byte, in header and tensors; but the header's padding says nothing."""
    path = save(tmp_path, 1)
    data = path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    padding = range(len(data[:header_end].rstrip()), header_end)
    for byte in range(len(data)):
        if byte not in padding:
            flipped = bytearray(data)
            flipped[byte] ^= 1 << byte % 8
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError):
                checkpoints.load(path)


def test_what_another_process_has_verified_is_opened_by_its_word_and_no_other(tmp_path):
    path, other = save(tmp_path, 1), save(tmp_path, 2)
    sha256 = checkpoints.load(path).sha256
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of a tensor
    path.write_bytes(data)
    assert checkpoints.load(path, verified=sha256).step == 1, "its tensors are not read again"
    for wrong in (other, path):
        with pytest.raises(CheckpointError, match="do not match their SHA-256"):
            checkpoints.load(wrong, verified=sha256 if wrong == other else None)


def test_nothing_whole_is_an_error_and_not_a_fresh_start(tmp_path):
    damage_truncate(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.load_newest(tmp_path)
    assert checkpoints.load_newest(tmp_path / "none") is None


def test_what_is_read_is_what_was_verified(tmp_path):
    """A trainer may prune or replace a file while somebody evaluates it."""
    found = checkpoints.load(save(tmp_path, 7))
    save(tmp_path, 7, {name: tensor + 1 for name, tensor in make(7).items()})
    assert holds(found, 7, make(7))
    checkpoints.path_of(tmp_path, 7).unlink()
    assert holds(found, 7, make(7))


# --------------------------------------------------------------------------- faults


@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if moment == "write":
        monkeypatch.setattr(checkpoints, "write_stream", full)
    elif moment == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match=r"No space left.*step 1 stays good"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step-00000001.safetensors"]
    assert holds(checkpoints.load_newest(tmp_path), 1, make(1))


@contextmanager
def largest_file(num_bytes):
    """The kernel refuses to write more into a file, half-way through a tensor too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_after_a_refused_write_all_tensors_are_still_asked_for(tmp_path):
    """The other ranks wait in the gathering of each."""
    save(tmp_path, 1)
    tensors = {f"param/{i}": torch.full((10_000,), float(i)) for i in range(10)}
    asked = []

    def one_by_one():
        for name, tensor in tensors.items():
            asked.append(name)
            yield name, tensor

    with largest_file(100_000), pytest.raises(CheckpointError, match=r"File too large.*step 1 stays good"):
        checkpoints.save(ALONE, tmp_path, 2, STATE, layout_of(tensors), one_by_one())
    assert asked == list(tensors)
    assert os.listdir(tmp_path) == ["step-00000001.safetensors"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_a_fault_in_the_gathering_is_raised_as_it_is(tmp_path, fault):
    save(tmp_path, 1)

    def failing():
        yield from list(make(2).items())[:2]
        raise fault("rank 1 is gone")

    with pytest.raises(fault, match="rank 1 is gone"):
        checkpoints.save(ALONE, tmp_path, 2, STATE, layout_of(make(2)), failing())
    assert os.listdir(tmp_path) == ["step-00000001.safetensors"]


# --------------------------------------------------------------------------- memory


@pytest.mark.parametrize("rank", [0, 1])
def test_one_tensor_is_alive_at_a_time(tmp_path, rank):
    """On the rank that writes, and on those that only take part."""
    layout = {f"param/{i}": (torch.float32, (10,)) for i in range(5)}
    made = []

    def one_by_one():
        for name in layout:
            assert all(array() is None for array in made), f"something lives on while {name} is made"
            array = np.zeros(10, dtype=np.float32)
            made.append(weakref.ref(array))  # dies with the last tensor on its memory
            tensor = torch.from_numpy(array)
            del array
            yield name, tensor
            del tensor

    checkpoints.save(replace(ALONE, rank=rank), tmp_path, 1, STATE, layout, one_by_one())
    assert len(made) == 5
    assert checkpoints.steps_in(tmp_path) == ([1] if rank == 0 else [])


def test_saving_and_verifying_hold_one_tensor_of_many(tmp_path):
    """120 MB in 20 tensors, in a fresh process: its peak resident memory grows by little more than one of them."""
    code = """
import resource, sys, torch
from pathlib import Path
from cml_dist.distributed.world import World
from cml_dist.run import checkpoint as checkpoints
torch.set_num_threads(1)
world = World(accelerator=None, rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
def write(step, num, size):
    layout = {f"param/{i}": (torch.float32, (size,)) for i in range(num)}
    tensors = ((name, torch.full((size,), 1.0)) for name in layout)
    return checkpoints.load(checkpoints.save(world, Path(sys.argv[1]), step, {}, layout, tensors))
def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
write(1, 2, 10)
before = peak_mb()
found = write(2, 20, 1_500_000)
print(found.path.stat().st_size / 1e6, peak_mb() - before)
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    size_mb, grown_mb = map(float, run.stdout.split())
    assert size_mb > 119
    assert grown_mb < 40


# --------------------------------------------------------------------------- the strategy, other networks, pruning


class TwoValues(torch.nn.Module):
    """As much of a meta-model as saving needs; the optimizer numbers its parameters the other way round."""

    names = ("body.w", "head.b")

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.values = torch.nn.ParameterList([torch.randn(3, 4), torch.randn(4)])

    def strategy(self, optimizer):
        class Plain:
            def prepare_model(self, model):
                return model

        return DataParallel(replace(ALONE, accelerator=Plain()), self, optimizer(list(self.values)[::-1]))


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.1), {"step", "exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
        (lambda p: torch.optim.SGD(p, lr=0.1), set()),
    ],
)
def test_a_strategy_gives_what_it_lays_out_and_takes_it_back(tmp_path, optimizer, moments):
    def step(strategy):
        for value in strategy.model.values:
            value.grad = torch.cos(value.detach())
        strategy.apply(0.1, None)

    first = TwoValues(0).strategy(optimizer)
    assert list(first.saved_layout()) == ["param/body.w", "param/head.b"]
    step(first)
    names = [f"param/{n}" for n in TwoValues.names]
    assert list(first.saved_layout())[:2] == names
    assert set(first.saved_layout()) == {*names, *(f"moment/{key}/{n}" for key in moments for n in TwoValues.names)}
    assert [(n, (t.dtype, tuple(t.shape))) for n, t in first.saved_tensors()] == list(first.saved_layout().items())

    path = checkpoints.save(ALONE, tmp_path, 1, STATE, first.saved_layout(), first.saved_tensors())
    found = checkpoints.load(path)
    second = TwoValues(1).strategy(optimizer)
    second.load(found.read, found.layout)
    for _ in range(2):
        for (name, ours), (other, theirs) in zip(first.saved_tensors(), second.saved_tensors(), strict=True):
            assert name == other and torch.equal(ours, theirs), name
        step(first)
        step(second)


def test_another_network_is_refused_by_name(tmp_path):
    def net(width=4, **more):
        made = torch.nn.ModuleDict({"body": torch.nn.ParameterDict({"w": torch.zeros(3, width)})})
        made["head"] = torch.nn.ParameterDict({"b": torch.zeros(4), **more})
        return made

    found = checkpoints.load(save(tmp_path, 1))
    checkpoints.check_same_run(found, net())
    fewer, more = net(), net(new=torch.zeros(()))
    del fewer["head"]
    cases = ((net(5), r"body.w has shape \(3, 4\)"), (fewer, "head.b"), (more, r"head.new has shape none.*\(\)"))
    for other, words in cases:
        with pytest.raises(CheckpointError, match=f"another network: {words}"):
            checkpoints.check_same_run(found, other)


def test_what_another_method_learned_is_refused_by_name(tmp_path):
    learned = {name: torch.ones(1, 2) for name in ("param/weight", "param/rule.lr.weight")}
    found = checkpoints.load(save(tmp_path, 1, learned))
    net = torch.nn.Linear(2, 1, bias=False)
    with pytest.raises(CheckpointError, match="holds what another method learned: rule.lr.weight has shape .* none in"):
        checkpoints.check_same_run(found, net)


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    (tmp_path / ".step-00000007.safetensors.writing-n01-7-7").write_bytes(b"killed")
    checkpoints.prune(tmp_path, 2, [3])
    assert checkpoints.steps_in(tmp_path) == [3, 5, 6]
    assert len(os.listdir(tmp_path)) == 3


def test_a_checkpoint_that_may_not_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch):
    """A file server that is away: an older checkpoint must not be used instead, nor this one set aside."""
    for step in (1, 2):
        save(tmp_path, step)

    def away(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "StreamReader", away)
        with pytest.raises(CheckpointError, match="step-00000002.safetensors cannot be read: Stale") as error:
            checkpoints.load_newest(tmp_path)
    assert not isinstance(error.value, checkpoints.DamagedCheckpoint)
    assert checkpoints.load_newest(tmp_path).step == 2
