"""How much memory is left on this machine, as far as this process may use it. Linux."""

from __future__ import annotations

import psutil

from cml_dist.data.control_groups import group_settings
from cml_dist.errors import DataError


def available_bytes() -> int:
    """Memory that could be had now without swapping, at most the limit of this process's control groups."""
    said = group_settings("memory", "memory.limit_in_bytes", unified="memory.max")  # which psutil does not know
    return min([psutil.virtual_memory().available, *(int(limit) for [limit] in said if limit.isdigit())])  # else "max"


def check_room(path: str, size: int) -> None:
    """Raises DataError where the ``size`` bytes that a file holds are more than half of the memory that is left."""
    if size > (room := available_bytes()) // 2:
        raise DataError(f"{path} holds {size:,} bytes, and {room:,} of memory are free", "use a larger machine")
