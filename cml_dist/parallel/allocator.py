"""Keep freed CPU memory in the process: activations of tens of MiB come and go thousands of times a minute."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's numbers, see mallopt(3)."""


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory instead of giving it back to the kernel after each tensor.

    By default every large tensor is mapped and zeroed anew, page by page. Reusing makes a Conv-4 meta-step on the CPU
    about 1.5 times as fast (benchmarks/2026-11-22-cpu.md); values do not change.

    Returns:
        Whether the C library took the advice (others than glibc do not have it).
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
