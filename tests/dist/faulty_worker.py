"""The command line with one fault built in, chosen by FAULT: stands for what a broken rank would do."""

from __future__ import annotations

import atexit
import os
import sys
import warnings

from cml_dist.cli import main
from cml_dist.domains.sinusoid import SinusoidDomain
from cml_dist.errors import DataError

FAULT, RANK = os.environ.get("FAULT", ""), int(os.environ.get("RANK", 0))
episode, build = SinusoidDomain.episode, SinusoidDomain.build.__func__


def faulty_episode(self, split, index):
    if split == "train" and index >= 12 and RANK == 1:
        if FAULT == "data":
            raise DataError("image x.png in shard train-000003.tar cannot be decoded", "pack the set again")
        if FAULT == "bug":
            raise RuntimeError("a fault of ours")
        if FAULT == "killed":
            os.kill(os.getpid(), 9)
    made = episode(self, split, index)
    if FAULT == "nan" and split == "train" and index == 7:
        made.support.inputs[0] = float("nan")  # an episode of one rank only
    return made


def faulty_build(cls, config, **rest):
    if FAULT == "warned":
        warnings.warn(f"a library's warning on rank {RANK}", UserWarning, stacklevel=2)
    if FAULT == "setup" and RANK == 1:
        raise DataError("shard train-000003.tar is missing", "copy it to this machine")
    return build(cls, config, **rest)


if FAULT == "teardown":
    atexit.register(os.abort)  # as torch's gloo threads do, now and then, while the interpreter goes down
SinusoidDomain.episode = faulty_episode
SinusoidDomain.build = classmethod(faulty_build)
sys.exit(main())
