"""The command line with one fault built in, chosen by FAULT: stands for what a broken rank would do."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import time
import warnings

import torch

from cml_dist.cli import command
from cml_dist.data.sinusoid import SinusoidDomain
from cml_dist.errors import DataError
from cml_dist.nets.mlp import MLP
from cml_dist.run.safetensors_stream import StreamReader

FAULT, RANK = os.environ.get("FAULT", ""), int(os.environ.get("RANK", 0))
IS_FAULTY = RANK == int(os.environ.get("FAULTY_RANK", 1)) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
EPISODE = 12
"""The first training episode that the faulty rank stumbles over; steps 1 to 4 of 3 episodes go well."""
forward, read = MLP.forward, StreamReader.read
episode, build = SinusoidDomain.episode, SinusoidDomain.__init__


def on_step(step, what):
    """Faults of the process itself: the public hook of the trainer."""
    if not IS_FAULTY:
        return
    if what == "episode" and step >= 4 and FAULT in PROCESS_FAULTS:
        print(f"fault at {time.time()}", flush=True)
        PROCESS_FAULTS[FAULT]()
    if what == "closing" and FAULT == "hangs at the end":
        hang_at_the_end()
    if what == "episode":
        MLP.forward = slow_forward if FAULT == "slow" and step == 4 else forward


def hang_in_python():
    while True:
        time.sleep(0.1)


def hang_at_the_end(*_):
    print(f"fault at {time.time()}", flush=True)
    hang_in_python()


def bug():
    raise RuntimeError("a fault of ours")


PROCESS_FAULTS = {
    "bug": bug,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hangs": hang_in_python,
    "keeps the lock": lambda: ctypes.PyDLL(None).sleep(1000),  # of Python: no other thread of this process runs
}


def faulty_episode(self, split, index):
    """Faults of the data, also in a loader process."""
    if split == "train" and index >= EPISODE and IS_FAULTY and FAULT in ("data", "data hangs"):
        print(f"fault at {time.time()}", flush=True)
        if FAULT == "data hangs":
            hang_in_python()
        raise DataError("image x.png in shard train-000003.tar cannot be decoded", "pack the set again")
    made = episode(self, split, index)
    if FAULT == "nan" and split == "train" and index == 7:
        made.support.inputs[0] = float("nan")  # an episode of one rank only
    return made


def faulty_build(self, *arguments):
    if FAULT == "warned":
        warnings.warn(f"a library's warning on rank {RANK}", UserWarning, stacklevel=2)
    if FAULT == "asked to stop" and IS_FAULTY:
        os.kill(os.getpid(), signal.SIGUSR1)
    if FAULT == "setup" and IS_FAULTY:
        raise DataError("shard train-000003.tar is missing", "copy it to this machine")
    build(self, *arguments)


def counted_read(self, name):
    print(f"rank {RANK} reads {name}", flush=True)
    return read(self, name)


def slow_forward(self, inputs):
    """Of a large network: each pass takes its time, and an episode has many."""
    time.sleep(1.0)
    return forward(self, inputs)


def killed_at_start(*arguments, **rest):
    print(f"fault at {time.time()}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


if FAULT == "teardown":
    atexit.register(os.abort)  # as torch's gloo threads do, now and then, while the interpreter goes down
if FAULT == "counts reads":
    StreamReader.read = counted_read
if FAULT == "hangs as it leaves" and IS_FAULTY:
    torch.distributed.destroy_process_group = hang_at_the_end
if FAULT == "start" and IS_FAULTY:
    torch.distributed.init_process_group = killed_at_start
SinusoidDomain.episode = faulty_episode
SinusoidDomain.__init__ = faulty_build
sys.exit(command(on_step=on_step))
