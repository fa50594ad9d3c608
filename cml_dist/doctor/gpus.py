"""The GPUs of a machine: what torch sees of them, and whether they can compute."""

from __future__ import annotations

import glob
import os
import subprocess
from collections.abc import Iterator

from cml_dist.doctor.check import Case
from cml_dist.doctor.findings import Finding

GIB = 2**30
FEW_GIB = 4.0
OTHERS_GIB = 1.0
"""Memory in use, above which somebody else seems to work on the GPU."""


def check_gpus(case: Case) -> Iterator[Finding]:
    """GPUs against the processes of this machine."""
    import torch

    wanted, processes = case.config.run.device, case.place.local_size
    if wanted == "cpu":
        yield Finding("GPUs", "ok", "not used: run.device is cpu")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        yield _no_gpu(wanted, torch.version.cuda)
        return
    driver = driver_version()
    named = f", driver {driver}" if driver else ""
    if processes > count:
        remedy = f"launch with --num_processes {count} on this machine, or set run.device=cpu"
        yield Finding("GPUs", "fault", f"{count}{named}, for {processes} processes", remedy)
    elif processes < count:
        yield Finding(
            "GPUs", "note", f"{count}{named}, for {processes} processes", f"to use all: --num_processes {count}"
        )
    else:
        yield Finding(
            "GPUs", "ok", f"{count}{named}", alike="take machines of the same kind, or the slowest sets the pace"
        )


def check_own_gpu(case: Case) -> Iterator[Finding]:
    """The GPU of this process: its name and memory, and a small product computed on it."""
    import torch

    if case.config.run.device == "cpu" or not torch.cuda.is_available():
        return
    number = case.place.local_rank
    if number >= torch.cuda.device_count():
        return  # check_gpus says it
    name = torch.cuda.get_device_name(number)
    major, minor = torch.cuda.get_device_capability(number)
    if not computes(number):
        yield Finding("GPU", "fault", f"{name} computes wrongly", "take it out of service")
        return
    free, total = (value / GIB for value in torch.cuda.mem_get_info(number))
    value = f"free of {total:.3g} GiB: {name} (compute capability {major}.{minor})"
    data = {"name": name, "free_gib": free, "total_gib": total, "index": number}
    alike = "take machines of the same kind, or the slowest sets the pace"
    if total - free > OTHERS_GIB + 0.05 * total:
        remedy = "see nvidia-smi: another process holds memory; end it, or ask for GPUs of your own"
        yield Finding("GPU", "warning", value, remedy, free, "GiB", alike=alike, data=data)
    elif total < FEW_GIB:
        yield Finding(
            "GPU", "warning", value, "set memory.budget_gib, or a larger GPU", free, "GiB", alike=alike, data=data
        )
    else:
        yield Finding("GPU", "ok", value, "", free, "GiB", alike=alike, data=data)


def computes(number: int) -> bool:
    """Whether a small product comes out right on a GPU."""
    import torch

    ones = torch.ones(64, 64, device=f"cuda:{number}", dtype=torch.float64)
    return float((ones @ ones).sum()) == 64.0**3


def _no_gpu(wanted: str, built_for: str | None) -> Finding:
    """Why torch sees none, as far as can be known."""
    hardware = bool(glob.glob("/dev/nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hardware and not built_for:
        why, remedy = "torch sees none: it was built for the CPU alone", "install a build of torch for CUDA"
    elif hardware and hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        why, remedy = f"hidden: CUDA_VISIBLE_DEVICES is {hidden!r}", "unset it, or ask the scheduler for GPUs (--gres)"
    elif hardware:
        why, remedy = "torch sees none, but there are some", "see nvidia-smi; the driver may be too old for this torch"
    elif wanted == "cuda":
        why, remedy = "none, but run.device is cuda", "set run.device=auto, or run where there are some"
    else:
        return Finding("GPUs", "ok", "none: the CPU computes, ranks talk through gloo", alike="take machines alike")
    return Finding("GPUs", "fault" if wanted == "cuda" else "warning", why, remedy)


def driver_version() -> str | None:
    """The NVIDIA driver's version, None where it does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] if said else None
