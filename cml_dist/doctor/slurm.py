"""The job this runs in, where it is one of SLURM's: its size, its end, and what happens at its end."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping

from cml_dist.doctor.check import Case
from cml_dist.doctor.findings import Finding
from cml_dist.parallel.env import idle_nodes

LITTLE_S = 15 * 60


def check_slurm(case: Case) -> Iterator[Finding]:
    """Nodes and tasks, memory, time left, and whether the job is warned and requeued."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    yield _size(job)
    shown = ask("scontrol", "show", "job", job)
    known = dict(re.findall(r"(\w+)=(\S+)", shown or ""))
    yield _time_left(job, os.environ)
    yield _requeue(known)
    yield _signal(job)


def _size(job: str) -> Finding:
    environment = os.environ
    nodes = environment.get("SLURM_JOB_NUM_NODES", "?")
    value = f"{job} on {nodes} node{'s' * (nodes != '1')} ({environment.get('SLURM_JOB_NODELIST', '?')})"
    value += f", partition {environment.get('SLURM_JOB_PARTITION', '?')}"
    for variable, words in (("SLURM_MEM_PER_NODE", "a node"), ("SLURM_MEM_PER_CPU", "a core")):
        if environment.get(variable, "0").isdigit() and environment.get(variable, "0") != "0":
            value += f", {int(environment[variable]) / 1024:.3g} GiB {words}"
    idle = idle_nodes()
    if idle is not None:
        what, _, remedy = idle.partition(": ")
        return Finding("job", "warning", f"{value}; {what}", remedy)
    return Finding("job", "ok", value)


def _time_left(job: str, environment: Mapping[str, str]) -> Finding:
    left = seconds_left(job, environment)
    if left is None:
        return Finding("time left", "note", "unlimited, or not known")
    words = f"{left // 3600:.0f} h {left % 3600 // 60:.0f} min" if left >= 3600 else f"{left / 60:.0f} min"
    if left < LITTLE_S:
        return Finding(
            "time left", "note", words, "ask for more (--time), if this is to be the run itself", data={"s": left}
        )
    return Finding("time left", "ok", words, data={"s": left})


def seconds_left(job: str, environment: Mapping[str, str]) -> float | None:
    """Until the job's limit: by its environment (SLURM 22.05 and later), else as squeue says."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        left = int(end) - time.time()
        return left if left < 10 * 365 * 86400 else None
    return _duration((ask("squeue", "-h", "-j", job, "-o", "%L") or "").strip())


def _duration(words: str) -> float | None:
    """``1-02:03:04`` or ``3:04`` in seconds."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", words)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _requeue(known: Mapping[str, str]) -> Finding:
    if "Requeue" not in known:
        return Finding("requeue", "note", "not known: scontrol does not answer here")
    times = known.get("Restarts", "0")
    if known["Requeue"] == "1":
        return Finding("requeue", "ok", f"allowed, requeued {times} times so far")
    remedy = "add #SBATCH --requeue, if the site allows it: then a pre-empted job goes on by itself"
    return Finding("requeue", "note", "not allowed: after a pre-emption it is for you to submit again", remedy)


def _signal(job: str) -> Finding:
    """The batch script alone says whether the job is warned before its end."""
    script = ask("scontrol", "write", "batch_script", job, "-")
    if script is None or "#!" not in script:
        return Finding("signal", "note", "not known: no batch script (interactive, or scontrol does not answer)")
    found = re.search(r"^#SBATCH\s+.*--signal[= ](\S+)", script, re.M)
    if found:
        return Finding("signal", "ok", f"the batch script asks for {found[1]} before the end")
    remedy = "add #SBATCH --signal=USR1@300 (see launch/slurm): then the run saves before its limit"
    return Finding("signal", "note", "none in the batch script (it may stand on sbatch's command line)", remedy)


def ask(*command: str) -> str | None:
    """What a command of SLURM's says; None where it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout if run.returncode == 0 else None
