"""What happens to a process whose parent ends. Imports nothing that takes time."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

PR_SET_PDEATHSIG = 1
"""See prctl(2)."""


def signal_when_parent_ends(number: int) -> None:
    """Have the kernel send this process a signal once the thread that made it has ended (Linux alone)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def launched_by_torchrun() -> bool:
    """Whether the parent is torchrun (accelerate launch too), whose main thread makes its ranks and outlives them."""
    return "TORCHELASTIC_RUN_ID" in os.environ
