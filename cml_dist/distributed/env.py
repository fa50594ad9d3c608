"""The only reader of launchers' environment variables: who this process is, and which world it belongs to. No torch."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cml_dist.config.launcher import LAUNCH_FILE
from cml_dist.errors import WorldError

STARTED_BY = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
"""How many copies of the command something started, without telling them of each other in torch's way."""

PORTS = (20000, 32000)
"""For the rendezvous of tasks that srun starts itself; below the range from which Linux gives out ports."""

NEEDED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Beside WORLD_SIZE."""

LAUNCHED_LOCALLY = "CML_DIST_LAUNCH_LOCAL"
"""Set by ``cml-dist launch local``, which shows no traceback of the launcher's and speaks of signals itself."""

TORCH_DEFAULTS = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # each store connection that breaks would be a page of C++ frames
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # a collective that fails ends its process
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "86400",  # it counts the time of a suspended job; our heartbeat does not
    "TORCH_FR_BUFFER_SIZE": "2000",  # the flight recorder: the last collectives of each rank
}
"""What torch's C++ parts read from the environment; a user's own values stay."""


class Launched(NamedTuple):
    """This process among all, as the environment has it; a world of one where it says nothing.

    Attributes:
        rank, size: this process, and how many there are.
        local_rank, local_size: the same on this machine.
        host, port: where the ranks meet (MASTER_ADDR and MASTER_PORT).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = ""
    port: int = 0


def launched(environment: Mapping[str, str] = os.environ) -> Launched:
    """Read RANK, WORLD_SIZE and the like, as torchrun and accelerate launch set them.

    Nothing is guessed: a wrong LOCAL_RANK would put two processes on one GPU, a wrong WORLD_SIZE train two runs.

    Raises:
        WorldError: some of them are missing, or cannot be.
    """
    size = _number(environment, "WORLD_SIZE")
    if size is None and environment.get("RANK") and environment.get("MASTER_ADDR"):
        raise WorldError(
            "RANK and MASTER_ADDR are set, but WORLD_SIZE is not",
            "set WORLD_SIZE to the number of all processes, or unset RANK and MASTER_ADDR",
        )
    if size is None or size == 1:  # a RANK that something else left behind must not turn a lone process into another
        return Launched()
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        raise WorldError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
            "set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process "
            "(one process a machine: LOCAL_RANK=0 LOCAL_WORLD_SIZE=1), or unset WORLD_SIZE",
        )
    rank, local_rank, local_size, port = (
        _number(environment, name) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    )
    for name, value, first, end in (
        ("RANK", rank, 0, size),
        ("LOCAL_WORLD_SIZE", local_size, 1, size + 1),
        ("LOCAL_RANK", local_rank, 0, local_size),
        ("MASTER_PORT", port, 1, 2**16),
    ):
        if not first <= value < end:
            raise WorldError(
                f"{name} is {value}, but must lie in {first} to {end - 1} (WORLD_SIZE is {size})", f"set {name} right"
            )
    return Launched(rank, size, local_rank, local_size, environment["MASTER_ADDR"], port)


def launched_or_alone() -> Launched:
    """As :func:`launched`, for who speaks and how a process ends: a world that cannot be is one of this process."""
    try:
        return launched()
    except WorldError:
        return Launched()


def environment_of(place: Launched, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of a new process in that place of a world of its own, without what speaks of this one's."""
    ours = ("TORCHELASTIC_", "GROUP_", "ROLE_", "PET_")  # of torchrun's own processes
    kept = {k: v for k, v in environment.items() if k not in ("WORLD_SIZE", *NEEDED) and not k.startswith(ours)}
    if place.size == 1:
        return kept
    values = (place.rank, place.local_rank, place.local_size, place.host, place.port)
    return {**kept, "WORLD_SIZE": str(place.size), **{k: str(v) for k, v in zip(NEEDED, values, strict=True)}}


def check_launch(asked: int | None, environment: Mapping[str, str] = os.environ) -> Launched:
    """The world that was launched, refused where it is not the one that was asked for.

    Args:
        asked: ``parallel.processes``; a run that names its world means it, also where something started it many times.

    Raises:
        WorldError: another number of processes, or one world a copy where srun or mpirun started several copies.
    """
    world = launched(environment)
    if asked is not None and asked != world.size:
        raise WorldError(
            f"parallel.processes asks for {asked} processes, but the world has {world.size}",
            f"launch with cml-dist launch local --processes {asked}, or set parallel.processes={world.size}",
        )
    if asked is not None:
        return world
    # `accelerate launch --cpu --num_processes 2` starts one process alone; this is all it tells of the other.
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise WorldError(
            "several processes were asked for, but accelerate launch started one (it takes --cpu and MULTI_CPU for it)",
            "launch with cml-dist launch local --processes N -- ..., or with launch/accelerate/cpu.yaml, a file of "
            "cml-dist launch files launch",
        )
    # Copies that do not know of each other would train several runs, in one folder. torchrun and accelerate launch: one
    # agent a copy. Else each copy is a process of the world.
    parts = _number(environment, "GROUP_WORLD_SIZE") or world.size
    for name, starter in STARTED_BY.items():
        copies = _number(environment, name) or 1
        if copies > 1 and parts < copies:
            raise WorldError(
                f"{starter} started {copies} copies of this command ({name}), but they do not form one world: that of "
                f"this copy has {world.size} process{'es' * (world.size != 1)} on {parts} machine{'s' * (parts != 1)}",
                "start with accelerate launch or torchrun on each machine (docs/how-to/several-machines.md); if "
                f"separate runs are meant, say so by parallel.processes={world.size}",
            )
    return world


def idle_nodes(environment: Mapping[str, str] = os.environ) -> str | None:
    """A warning where a SLURM job has more nodes than the world, and no srun chose so: as in a batch script without."""
    nodes, step = _number(environment, "SLURM_JOB_NUM_NODES") or 1, environment.get("SLURM_STEP_NUM_NODES")
    world = launched(environment)
    used = -(-world.size // world.local_size)
    if used >= nodes or step == str(used):
        return None
    return (
        f"the job has {nodes} nodes, but this run is on {used}: start it by srun, as cml-dist launch slurm does, "
        f"or ask for --nodes={used}"
    )


def forget_others() -> None:
    """Remove what the environment says of other processes, if this one is alone and no launcher's.

    Accelerate would wait for those that a stray LOCAL_RANK or an mpirun of separate runs (PMI_SIZE) speaks of.
    """
    by_a_launcher = all(os.environ.get(name) for name in ("WORLD_SIZE", *NEEDED))
    if launched().size == 1 and not by_a_launcher:
        for name in ("WORLD_SIZE", *NEEDED, *STARTED_BY):
            os.environ.pop(name, None)


def set_torch_defaults() -> None:
    """Set :data:`TORCH_DEFAULTS`; before torch is imported."""
    for name, value in TORCH_DEFAULTS.items():
        os.environ.setdefault(name, value)


def host_name() -> str:
    """This machine, as its users know it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def launched_by_torchrun() -> bool:
    """Whether the parent is torchrun (accelerate launch too), whose main thread makes its ranks and outlives them."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launcher_adds_noise() -> str:
    """What to say behind an error that a launcher's own traceback follows; empty where none does."""
    by_accelerate = "ACCELERATE_USE_CPU" in os.environ  # of one process, without torchrun
    is_noisy = (launched_by_torchrun() or by_accelerate) and LAUNCHED_LOCALLY not in os.environ
    return " (what the launcher prints below says no more than this line)" if is_noisy else ""


def name_launch_file() -> None:
    """Have the environment name the Accelerate file that the launcher was given, for who reads what it asks for."""
    if launched_by_torchrun():
        with suppress(OSError):
            words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace")
            if found := re.search("\0--config_file[=\0]([^\0]+)", words):
                os.environ.setdefault(LAUNCH_FILE, found[1])


def threads_asked(environment: Mapping[str, str] = os.environ) -> int | None:
    """OMP_NUM_THREADS, where the user has set it: torchrun and accelerate launch make one up where nobody has."""
    word = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not word.isdigit() or int(word) == 0:
        return None
    if launched_by_torchrun() or "ACCELERATE_USE_CPU" in environment:
        with suppress(OSError):  # what the launcher itself was started with
            launcher = Path(f"/proc/{os.getppid()}")
            asked = b"--num_cpu_threads_per_process" in (launcher / "cmdline").read_bytes()
            if not asked and b"\0OMP_NUM_THREADS=" not in b"\0" + (launcher / "environ").read_bytes():
                return None
    return int(word)


def launcher_serves_store() -> bool:
    """Whether the launcher's agent, and not rank 0, listens at MASTER_PORT."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> tuple[int, int]:
    """How often the launcher has started this world again in place, and how often it may."""
    count, most = (os.environ.get(f"TORCHELASTIC_{name}") or 0 for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return int(count), int(most)


@dataclass(frozen=True)
class Start:
    """Which start of which job a process belongs to.

    Attributes:
        host, pid: of the process.
        job: SLURM's number, None outside.
        requeued: how often SLURM has put the job back into the queue.
        in_place: how often the launcher has started its processes again, as it counts.
    """

    host: str
    pid: int
    job: str | None = None
    requeued: int = 0
    in_place: int = 0

    @property
    def restart(self) -> int:
        """How often the job was requeued or started again in place: for people, since it can fall after a requeue."""
        return self.requeued + self.in_place


def this_start() -> Start:
    """The start that this process belongs to."""
    job, requeued = os.environ.get("SLURM_JOB_ID") or None, int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return Start(socket.gethostname(), os.getpid(), job, requeued, restarts()[0])


def join_srun(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of torch's rendezvous for a task of a job step of several; none where a launcher set them already.

    Found on the node, in the task: rank and machine of a batch script are those of its first node (trap 24).

    Raises:
        WorldError: SLURM does not say where rank 0 runs.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or tasks < 2:
        return {}
    try:
        node = int(environment["SLURM_NODEID"])
        step = int(environment["SLURM_JOB_ID"]) * 64 + int(environment["SLURM_STEP_ID"])
        return {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": str(tasks),
            "LOCAL_WORLD_SIZE": str(tasks_of_node(environment["SLURM_STEP_TASKS_PER_NODE"], node)),
            "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(PORTS[0] + step % (PORTS[1] - PORTS[0])),
        }
    except (LookupError, ValueError) as error:
        raise WorldError(
            f"srun started {tasks} tasks, but does not say enough to join them: {error}",
            "start them by srun accelerate launch, as cml-dist launch slurm does",
        ) from error


def tasks_of_node(counts: str, node: int) -> int:
    """``2(x3),1`` and 3 -> 1: how many tasks the node of that number has."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))][node]


def first_host(nodes: str) -> str:
    """The first of a list in SLURM's notation, e.g. ``n[01-04],x7`` -> ``n01``.

    As launch/slurm/node.sh finds it: scontrol is on no node by necessity, and in no container.
    """
    while found := re.fullmatch(r"([^],]*?)\[(\d+)[^]]*\](.*)", nodes):
        nodes = "".join(found.groups())
    return nodes.split(",")[0]


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise WorldError(f"{name} is {text!r}, which is no count", f"set it right, or unset {name}") from None
    return number
