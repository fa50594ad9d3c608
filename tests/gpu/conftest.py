"""What needs a GPU; everything here is skipped without."""

from __future__ import annotations

import pytest
import torch
from plan import gpu_arithmetic


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def arithmetic() -> None:
    """That of a run on the GPU."""
    gpu_arithmetic()
