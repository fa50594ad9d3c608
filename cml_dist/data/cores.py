"""How many cores this process may use. Linux."""

from __future__ import annotations

import math
import os

from cml_dist.data.control_groups import group_settings


def usable_cores() -> int:
    """By affinity (taskset, srun), and by the quota of this process's control groups, rounded up; at least 1."""
    cores = len(os.sched_getaffinity(0))
    for quota, period in group_settings("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us", unified="cpu.max"):
        if quota.isdigit():  # else "max", or -1
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)
