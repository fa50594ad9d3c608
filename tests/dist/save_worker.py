"""Run by every rank: save tensors of which each rank has a slice, and that exist only as they are gathered, with a fault.

Stands for any strategy that partitions parameters: each item of ``saved_tensors`` is a collective.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cml_dist.config.load import parse_config
from cml_dist.errors import CheckpointError
from cml_dist.distributed.exit import leave
from cml_dist.distributed.world import World, join_world
from cml_dist.run import checkpoint as checkpoints

NUM, SIZE = 20, 100_000
LAYOUT = {f"param/{number}": (torch.float32, (SIZE,)) for number in range(NUM)}
folder, fault = Path(sys.argv[1]), sys.argv[2]


def whole(number: int) -> Tensor:
    return torch.arange(SIZE, dtype=torch.float32) * (number + 1)


def gathered(world: World) -> Iterator[tuple[str, Tensor]]:
    for number, name in enumerate(LAYOUT):
        if fault == "gather" and world.rank == 1 and number == 10:
            raise RuntimeError("a fault of ours")
        mine = whole(number).chunk(world.size)[world.rank]
        parts = [torch.empty_like(mine) for _ in range(world.size)]
        torch.distributed.all_gather(parts, mine)
        yield name, torch.cat(parts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    this = join_world(parse_config({"domain": {"name": "sinusoid"}, "parallel": {"hang_timeout_s": 10}}))
    checkpoints.save(this, folder, 1, {}, LAYOUT, gathered(this))
    if fault == "disk" and this.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))  # of 8 MB: the kernel refuses the rest
    try:
        checkpoints.save(this, folder, 2, {}, LAYOUT, gathered(this))
    except CheckpointError as error:
        print(f"rank {this.rank} of {this.size} heard: {error}", flush=True)
    this.run_on_all_ranks(lambda: None)  # all are still in step
    found = checkpoints.load_newest(folder)
    for number, name in enumerate(LAYOUT):
        assert torch.equal(found.read(name), whole(number)), name
    print(f"rank {this.rank} of {this.size} reads step {found.step}", flush=True)
    this.close()
    leave(0)
