"""What needs a GPU; everything here is skipped without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from plan import gpu_arithmetic


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def arithmetic() -> Iterator[None]:
    """That of a run on the GPU."""
    before = torch.get_num_threads()
    gpu_arithmetic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)
