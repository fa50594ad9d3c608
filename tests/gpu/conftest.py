"""What needs a GPU; everything here is skipped without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parity_worker import config_of

from cml_dist.parallel.world import World, set_arithmetic


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def arithmetic(gpu: torch.device) -> Iterator[None]:
    """That of a run on the GPU."""
    before = torch.get_num_threads()
    world = World(accelerator=None, rank=0, size=1, local_rank=0, local_size=1, device=gpu)
    set_arithmetic(config_of("single", "float32", "sgd"), world)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)
