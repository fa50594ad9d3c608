"""A machine without its GPUs: cores and threads, memory, shared memory, limits of open files and processes."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from cml_dist.doctor.check import Case
from cml_dist.doctor.findings import Finding
from cml_dist.domains.free_memory import available_bytes, limit_bytes

GIB = 2**30
PROCESS_GIB = 1.5
"""Memory that a process takes with torch and its libraries, before any network."""

SHARED_GIB = 0.5
"""Shared memory under which loader processes, or NCCL between GPUs, run short (Docker gives 64 MiB unasked)."""

FILES, FEW_FILES, MANY_FILES = 1024, 256, 65536
"""Open files that a process with loaders may need, so few that it does not start, and what is worth asking for."""

PROCESSES = 1024
PINNED_GIB = 1.0


def check_cores(case: Case) -> Iterator[Finding]:
    """CPU cores that this process may use, and how many threads will share them."""
    place, parallel = case.place, case.config.parallel
    cores = len(os.sched_getaffinity(0))
    all_cores = os.cpu_count() or cores
    quota = cpu_quota()
    usable = cores if quota is None else min(cores, quota)
    threads = parallel.threads or max(1, cores // place.local_size)
    value = f"{cores} of {all_cores}" + (f", limited to {quota:g} by a control group" if quota is not None else "")
    wanted = threads * place.local_size
    here = f"{place.local_size} process{'es' * (place.local_size != 1)}"
    value += f"; {here} of {threads} thread{'s' * (threads != 1)}"
    data = {"cores": sorted(os.sched_getaffinity(0)), "quota": quota, "threads": threads}
    if wanted > usable:
        fitting = max(1, int(usable // place.local_size))
        remedy = (
            f"set parallel.threads={fitting}" if fitting < threads else "start fewer processes, or ask for more cores"
        )
        yield Finding("CPU cores", "warning", f"{value}: more threads than cores", remedy, data=data)
    else:
        yield Finding("CPU cores", "ok", value, data=data)
    omp = os.environ.get("OMP_NUM_THREADS")
    if omp is not None and omp.isdigit() and int(omp) * place.local_size > usable:
        yield Finding(
            "OMP_NUM_THREADS",
            "note",
            f"{omp}, for {place.local_size} process{'es' * (place.local_size != 1)} on {usable:g} cores",
            "torch itself uses the threads above; for other libraries unset it, or set it to as many",
        )


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that the control groups of this process allow (version 2); None without a limit."""
    found: list[float] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (folder / "cpu.max").is_file():
                allowed, period = (folder / "cpu.max").read_text().split()[:2]
                if allowed.isdigit():
                    found.append(int(allowed) / int(period))
    return min(found, default=None)


def check_memory(case: Case) -> Iterator[Finding]:
    """Memory that is free, as far as control groups (containers, SLURM) let this process have it."""
    processes = case.place.local_size
    free, limit = available_bytes() / GIB, limit_bytes()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    value = f"free of {total:.3g} GiB" + (f", control group limit {limit / GIB:.3g} GiB" if limit is not None else "")
    data = {"free_gib": free, "total_gib": total, "limit_gib": None if limit is None else limit / GIB}
    budget = case.config.memory.budget_gib if _on_cpu(case) else None
    need = processes * (PROCESS_GIB + (budget or 0.0))
    why = f"{processes} process{'es' * (processes != 1)} need about {need:.3g} GiB" + (
        f" with memory.budget_gib={budget:g}" if budget else " before any network"
    )
    if free < processes * 0.5:
        yield Finding("memory", "fault", f"{value}: {why}", "free some, or ask for more", free, "GiB", data=data)
    elif free < need:
        remedy = "start fewer processes, lower memory.budget_gib, or ask for more memory (#SBATCH --mem)"
        yield Finding("memory", "warning", f"{value}: {why}", remedy, free, "GiB", data=data)
    else:
        yield Finding("memory", "ok", value, "", free, "GiB", data=data)


def check_shared_memory(case: Case, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """The memory through which loader processes hand over episodes, and NCCL and gloo talk inside a machine."""
    workers = case.config.domain.workers
    larger = "enlarge it (docker run --shm-size=8g, or --ipc=host; enroot, Apptainer: mount the machine's /dev/shm)"
    if not os.access(folder, os.W_OK) or not folder.is_dir():
        verdict = "warning" if workers == 0 else "fault"
        yield Finding("shared memory", verdict, f"{folder} cannot be written", f"mount a tmpfs there, or {larger}")
        return
    state = os.statvfs(folder)
    size, free = state.f_frsize * state.f_blocks / GIB, state.f_frsize * state.f_bavail / GIB
    value, data = f"free of {size:.3g} GiB in {folder}", {"free_gib": free, "size_gib": size}
    if free < SHARED_GIB:
        remedy = f"{larger}, or set domain.workers=0"
        yield Finding("shared memory", "warning", value, remedy, free, "GiB", data=data)
    else:
        yield Finding("shared memory", "ok", value, "", free, "GiB", data=data)


def check_limits(case: Case) -> Iterator[Finding]:
    """Limits of this process: open files, processes, locked memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{_limit(soft)} (ulimit -n)"
    goal = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    remedy = (
        f"ulimit -n {goal}" if goal > max(soft, FILES) else "ask the administrator for more (LimitNOFILE, limits.conf)"
    )
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        yield Finding("open files", "fault", f"{value}: shards, loaders and sockets need more", remedy)
    elif soft != resource.RLIM_INFINITY and soft < FILES:
        yield Finding("open files", "warning", f"{value}: loader processes may run out", remedy)
    else:
        yield Finding("open files", "ok", value, brief=True)
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and soft < PROCESSES:
        value = f"{_limit(soft)} for all that this user runs (ulimit -u)"
        yield Finding("processes", "warning", value, f"ulimit -u {4 * PROCESSES}, or ask the administrator")
    else:
        yield Finding("processes", "ok", f"{_limit(soft)} (ulimit -u)", brief=True)
    yield _locked_memory(case)


def _locked_memory(case: Case) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    value = "unlimited" if unlimited else f"{soft / 2**20:,.0f} MiB"
    value += " (ulimit -l)"
    several = case.place.size > case.place.local_size and not _on_cpu(case)
    if several and not unlimited and soft < PINNED_GIB * GIB:
        return Finding("locked memory", "warning", f"{value}: InfiniBand registers more", "ulimit -l unlimited")
    return Finding("locked memory", "ok", value, brief=True)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _on_cpu(case: Case) -> bool:
    """Whether the run will compute on the CPU."""
    if case.config.run.device == "cpu":
        return True
    import torch

    return not torch.cuda.is_available()
