"""The machine: GPU, cores and memory; and the SLURM job that lends it."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

from cml_dist.data.free_memory import available_bytes, limit_bytes
from cml_dist.distributed.env import idle_nodes
from cml_dist.telemetry import text
from cml_dist.tools.doctor.findings import GIB, Case, Finding, counted

PROCESS_GIB = 1.5
"""Memory that a process takes with torch and its libraries, before any network."""

TAKEN = 0.1
"""Part of a GPU's memory in use, above which somebody else seems to compute there."""

SHARED, SHARED_GIB = "/dev/shm", 0.5
"""Loader processes, NCCL and gloo talk through it; with less than that they run short (Docker gives 64 MiB)."""

SHORT_S = 15 * 60


def check_gpu(case: Case) -> Iterator[Finding]:
    """The GPU of this process, and whether its memory is free; where torch sees none, what may be why."""
    import torch

    wanted, processes, number = case.config.run.device, case.here.local_size, case.here.local_rank
    if wanted == "cpu":
        yield Finding("GPU", "ok", "not used: run.device is cpu")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = len(glob.glob("/dev/nvidia[0-9]*"))
    if not count and not there and wanted == "auto":
        yield Finding("GPU", "ok", "none: the CPU computes")
        return
    if number >= count:  # why is not known, but what may tell is
        value = f"torch sees {count} for {counted(processes, 'process')}; the machine has {there}, torch is built for "
        value += torch.version.cuda or "the CPU alone"
        value += ", CUDA_VISIBLE_DEVICES is " + repr(os.environ.get("CUDA_VISIBLE_DEVICES", "not set"))
        verdict = "fault" if count or wanted == "cuda" else "warning"
        yield Finding("GPU", verdict, value, "ask for a GPU a process, or set run.device=cpu; see nvidia-smi")
        return
    name, capability = torch.cuda.get_device_name(number), ".".join(map(str, torch.cuda.get_device_capability(number)))
    free, total = (value / GIB for value in torch.cuda.mem_get_info(number))
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    value = f"{name}, {total:.3g} GiB (compute capability {capability}, driver {driver or 'not known'})"
    verdict, remedy = "ok", ""
    if free < (1 - TAKEN) * total:
        verdict, value = "warning", f"{value}: {free:.3g} GiB are free"
        remedy = "see nvidia-smi: another process holds memory; end it, or ask for GPUs of your own"
    elif processes < count:
        verdict, value, remedy = "note", f"{value}, one of {count}", f"to use all: --num_processes {count}"
    data = {"name": name, "free_gib": free, "total_gib": total, "index": number}
    alike = "take machines of the same kind, or the slowest sets the pace"
    yield Finding("GPU", verdict, value, remedy, alike=alike, data=data)


def check_memory(case: Case) -> Iterator[Finding]:
    """Cores and memory, as far as control groups (containers, SLURM) let this process have them, and shared memory."""
    free, need = available_bytes() / GIB, case.here.local_size * PROCESS_GIB
    total = (limit_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / GIB
    value = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {free:.3g} GiB free of {total:.3g} GiB"
    verdict, remedy = "ok", ""
    if free < need:
        value += f": {counted(case.here.local_size, 'process')} take about {need:.3g} GiB before any network"
        verdict, remedy = "warning", "start fewer processes, or ask for more memory (#SBATCH --mem)"
    yield Finding("CPU", verdict, value, remedy, data={"free_gib": free, "total_gib": total})
    size, _, free = (value / GIB for value in shutil.disk_usage(SHARED))
    verdict, remedy = "ok", ""
    if free < SHARED_GIB:
        verdict, remedy = "warning", "enlarge it (docker run --shm-size=8g, or --ipc=host), or set domain.workers=0"
    value = f"{free:.3g} GiB free of {size:.3g} GiB in {SHARED}"
    yield Finding("shared memory", verdict, value, remedy, data={"free_gib": free})


def check_slurm(case: Case) -> Iterator[Finding]:
    """The job: its nodes, the time left, and whether it is warned before its end and requeued after it."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    known = dict(re.findall(r"(\w+)=(\S+)", _output("scontrol", "show", "job", job)))
    value = f"{job} on {os.environ.get('SLURM_JOB_NODELIST', '?')}, partition {known.get('Partition', '?')}"
    idle, _, remedy = (idle_nodes() or "").partition(": ")
    yield Finding("job", "warning" if idle else "ok", f"{value}; {idle}" if idle else value, remedy)
    end = os.environ.get("SLURM_JOB_END_TIME", "")  # since SLURM 22.05
    if end.isdigit():
        left_s = int(end) - time.time()
        verdict, remedy = ("note", "ask for more (--time) for the run itself") if left_s < SHORT_S else ("ok", "")
        yield Finding("time left", verdict, text.duration(left_s), remedy, data={"s": left_s})
    if known.get("Requeue") == "0":
        remedy = "add #SBATCH --requeue, if the site allows it: then a pre-empted job goes on by itself"
        yield Finding("requeue", "note", "not allowed: after a pre-emption you submit again", remedy)
    script = _output("scontrol", "write", "batch_script", job, "-")
    if script and not re.search(r"^#SBATCH\s+.*--signal[= ]\S+", script, re.M):
        remedy = "add #SBATCH --signal=USR1@300 (see launch/slurm): then the run saves before its limit"
        yield Finding("signal", "note", "none in the batch script (it may stand on sbatch's command line)", remedy)


def _output(*command: str) -> str:
    """What a command prints; nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
