"""What glibc does with freed CPU memory: activations of tens of MiB come and go thousands of times a minute."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""glibc's numbers, see mallopt(3)."""

MAP_FROM_BYTES = 64 * 2**10


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory instead of giving it back to the kernel after each tensor: for speed.

    By default every large tensor is mapped and zeroed anew, page by page. Reusing makes a Conv-4 meta-step on the CPU
    about 1.5 times as fast (benchmarks/2026-11-22-cpu.md); values do not change. The heap fragments: the process holds
    5 to 100 % more than its tensors do.

    Returns:
        Whether the C library took the advice (others than glibc do not have it).
    """
    return _advise({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def give_back_freed_memory() -> bool:
    """Tell glibc to map every tensor by itself and to give it back when it is freed: for a memory budget.

    Left alone, glibc raises its threshold with what it sees and fragments after all.

    Returns:
        Whether the C library took the advice.
    """
    return _advise({M_MMAP_THRESHOLD: MAP_FROM_BYTES})


def _advise(settings: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(bool(mallopt(setting, value)) for setting, value in settings.items())
