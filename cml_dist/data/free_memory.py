"""How much memory is left on this machine, as far as this process may use it. Linux."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def available_bytes() -> int:
    """Memory that could be had now without swapping, at most the limit of this process's control groups."""
    return min([psutil.virtual_memory().available, *_limits()])


def _limits() -> Iterator[int]:
    """Limits of the control groups, own and above (containers and SLURM set them), which psutil does not know."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (folder / name).is_file():
                limit = (folder / name).read_text().strip()
                if limit.isdigit():  # else "max"
                    yield int(limit)
