"""Processes that ``srun`` starts itself, without a launcher between: told who they are as torchrun would tell them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from cml_dist.errors import WorldError

PORTS = (20000, 32000)
"""Below the range from which Linux gives out ports by itself."""


def join_srun(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of torch's rendezvous for a task of a job step of several; none where a launcher set them already.

    Found on the node, in the task: rank and machine of a batch script are those of its first node (trap 24).

    Raises:
        WorldError: SLURM does not say where rank 0 runs.
    """
    environment = os.environ if environment is None else environment
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or tasks < 2:
        return {}
    try:
        step = int(environment["SLURM_JOB_ID"]) * 64 + int(environment["SLURM_STEP_ID"])
        return {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": str(tasks),
            "LOCAL_WORLD_SIZE": str(
                tasks_of_node(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"]))
            ),
            "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(PORTS[0] + step % (PORTS[1] - PORTS[0])),
        }
    except (KeyError, ValueError) as error:
        raise WorldError(
            f"srun started {tasks} tasks, but does not say enough to join them: {error}",
            "start them by srun accelerate launch, see launch/slurm",
        ) from error


def tasks_of_node(counts: str, node: int) -> int:
    """``2(x3),1`` and 3 -> 1: how many tasks the node of that number has."""
    each: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {counts!r}")
        each += [int(found[1])] * int(found[2] or 1)
    if node >= len(each):
        raise ValueError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE is {counts!r}")
    return each[node]


def first_host(nodes: str) -> str:
    """The first of a list in SLURM's notation, e.g. ``n[01-04],x7`` -> ``n01``.

    As launch/slurm/node.sh finds it: scontrol is on no node by necessity, and in no container.
    """
    while found := re.fullmatch(r"([^],]*?)\[(\d+)[^]]*\](.*)", nodes):
        nodes = "".join(found.groups())
    return nodes.split(",")[0]
