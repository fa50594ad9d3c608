"""Allocators: what glibc does with freed memory (activations of tens of MiB come and go), and a GPU's that runs out."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from cml_dist.errors import DeviceMemoryError

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

    Left alone, glibc raises its threshold with what it sees and fragments after all. Returns the same; also takes back
    :func:`keep_freed_memory`.
    """
    return _advise({M_MMAP_MAX: 65_536, M_MMAP_THRESHOLD: MAP_FROM_BYTES})


def _advise(settings: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(bool(mallopt(setting, value)) for setting, value in settings.items())


@contextmanager
def memory_explained(device: torch.device) -> Iterator[None]:
    """Turn the allocators' errors, paragraphs about their own settings, into one line with this package's remedies.

    Raises:
        DeviceMemoryError: in the place of ``torch.OutOfMemoryError``, and of that of the CPU, by the rank that it
            happened to.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        amounts = r"Tried to allocate (\S+ \S+)\..* total capacity of (\S+ \S+) of which (\S+ \S+) is free"
        found = re.search(amounts, str(error), re.DOTALL)
        numbers = f": {found[1]} were asked for, {found[3]} of {found[2]} were free" if found else ""
        raise DeviceMemoryError(
            f"the GPU's memory ran out ({device}){numbers}",
            "see nvidia-smi for other processes on it; set memory.budget_gib below what is free, so that engine, "
            "micro-batch and copies are chosen to fit, or take a ZeRO strategy (cml-dist plan says what each needs)",
        ) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        asked = re.search(r"allocate (\d+) bytes", str(error))
        amount = f": {int(asked[1]) / 2**30:,.1f} GiB were asked for" if asked else ""
        raise DeviceMemoryError(
            f"the memory of this machine ran out{amount}",
            "take a smaller network, fewer examples in an episode, or set memory.budget_gib",
        ) from error


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far, GiB: of the GPU's allocator, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def settled_memory() -> int:
    """Resident bytes of this process, once what is free is given back; :func:`peak_since_settled` begins there."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_since_settled() -> int:
    """The most resident bytes since then (Linux; elsewhere since the process began)."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
