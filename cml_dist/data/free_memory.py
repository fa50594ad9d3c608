"""How much memory is left on this machine, as far as this process may use it. Linux."""

from __future__ import annotations

import psutil

from cml_dist.data.control_groups import group_settings


def available_bytes() -> int:
    """Memory that could be had now without swapping, at most the limit of this process's control groups."""
    said = group_settings("memory", "memory.limit_in_bytes", unified="memory.max")  # which psutil does not know
    return min([psutil.virtual_memory().available, *(int(limit) for [limit] in said if limit.isdigit())])  # else "max"
