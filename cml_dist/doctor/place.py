"""Which process of which world this is, by its launcher's environment variables. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cml_dist.parallel.env import launched


@dataclass(frozen=True)
class Place:
    """One process among all.

    Attributes:
        rank, size: this process, and how many the launcher started.
        local_rank, local_size: the same on this machine.
        host: name of the machine.
        address: what that name means on the machine itself; empty where it means nothing.
        launcher: who started it, in words.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    launcher: str
    address: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def place_of(environment: Mapping[str, str] | None = None) -> Place:
    """The place of this process.

    Raises:
        WorldError: the environment describes no world that can be.
    """
    environment = os.environ if environment is None else environment
    here = launched(environment)
    host = socket.gethostname()
    if here.size == 1:
        return Place(0, 1, 0, 1, host, _launcher(environment))
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    return Place(here.rank, here.size, here.local_rank, here.local_size, host, _launcher(environment), address)


def _launcher(environment: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environment:
        by = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in environment else "torchrun"
        return f"{by}, inside srun" if "SLURM_STEP_ID" in environment else by
    if "SLURM_STEP_ID" in environment:
        return "srun"
    return "another launcher" if launched(environment).size > 1 else "none"
