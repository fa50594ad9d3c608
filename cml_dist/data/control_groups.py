"""The control groups of this process, by which containers and SLURM limit it. Linux."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def group_settings(controller: str, *names: str, unified: str) -> Iterator[list[str]]:
    """What the groups of this process say of a controller, its own and those above.

    Args:
        names: the files that say it under version 1 of control groups, a word each.
        unified: the one file that says it under version 2.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controller if controllers else "")
        files = names if controllers else (unified,)
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and all((folder / name).is_file() for name in files):
                yield [word for name in files for word in (folder / name).read_text().split()]
