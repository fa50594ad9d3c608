"""A SLURM of its own for the tests, and jobs on it. Nothing here waits for a moment, only for what must come."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cml_dist.telemetry.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT.parent / "shared" / "tools" / "slurm-cluster"
TIMES = ("seconds", "episodes_per_s", "peak_memory_gib")
FAST = ("parallel.threads=1", "domain.shots=5", "domain.queries=5", "model.hidden=[8,8]", "method.inner_steps=2",
        "optim.name=sgd", "run.log_every=5", "eval.every=0", "eval.val_episodes=5", "eval.episodes=7")  # fmt: skip
"""A network that learns in no time; how long a meta-step lasts, ``train.episodes_per_step`` says."""


class Cluster:
    """A SLURM of several nodes on this machine.

    Args:
        nodes: how many.

    Raises:
        RuntimeError: it does not come up; in the tool's own words.
    """

    def __init__(self, nodes: int) -> None:
        self.lab = Path(tempfile.mkdtemp(prefix="slurm-"))
        me = os.getpid()
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
            "SLURM_LAB": str(self.lab),
            "SLURM_LAB_SUBNET": f"10.{100 + me % 150}.{me // 150 % 250}",
            "SLURM_LAB_IFACE": f"cml{me}",
            "SLURM_LAB_CPUS": "8",
            # On a busy machine a save takes its time.
            "SLURM_LAB_KILL_WAIT": "60",
            "SLURM_LAB_GRACE": "120",
            # Also how long a credential holds: a node that has just been killed may take its time to start a step.
            "SLURM_LAB_REQUEUE_WAIT": "25",
            # As SLURM has it: job.sh must not wait until SLURM sees that a node is lost.
            "SLURM_LAB_NODE_TIMEOUT": "300",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        up = self.tool("up", str(nodes), timeout_s=600)
        if up.returncode:
            self.down()
            raise RuntimeError(up.stderr.strip() or "slurm-cluster does not come up")
        self.env["SLURM_CONF"] = str(self.lab / "etc" / "slurm.conf")

    def down(self) -> None:
        """Stop and remove everything."""
        self.tool("purge", timeout_s=120)
        shutil.rmtree(self.lab, ignore_errors=True)

    def tool(self, *words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """``slurm-cluster`` with these words."""
        command = [str(TOOL), *words]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout_s)

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What a command prints on the login node; it must succeed."""
        env = self.env | environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def launch(self, folder: Path, *words: str, **environment: str) -> Job:
        """``cml-dist launch slurm sinusoid``, with the log beside the run's ``folder``."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "cml_dist", "launch", "slurm", "sinusoid", f"run.dir={folder}", *FAST, *words]
        said = self.run(*command, cwd=folder.parent, **environment)
        return Job(self, re.match(r"Submitted job (\d+)", said)[1], folder, Path(re.search(r"tail -F (.*)", said)[1]))


@dataclass
class Job:
    """A submitted job, or a task of an array (``7_0``)."""

    cluster: Cluster
    id: str
    folder: Path
    log: Path
    fault: AssertionError | None = None

    @property
    def state(self) -> str:
        """Of the queue, e.g. ``RUNNING``; empty where the job is no longer in it."""
        command = ["squeue", "--noheader", f"--jobs={self.id}", "--format=%T"]
        done = subprocess.run(command, env=self.cluster.env, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else ""

    @property
    def ends(self) -> list[str]:
        """State and exit code of each end of the job so far, e.g. ``COMPLETED 0:0``; a requeued job has several."""
        file = self.cluster.lab / "log" / "jobs.txt"
        if "_" in self.id and not (self.folder / "status.json").exists():
            return []
        # A task of an array has a number of its own there.
        number = self.status["job"] if "_" in self.id else self.id
        found = re.findall(rf"^JobId={number} .*?JobState=(\S+) .* ExitCode=(\S+)", file.read_text(), re.M)
        return [" ".join(words) for words in found]

    @property
    def status(self) -> dict:
        """``status.json`` of the run."""
        return json.loads((self.folder / "status.json").read_text())

    @property
    def steps(self) -> int:
        """Lines of metrics so far."""
        file = self.folder / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    @property
    def starts(self) -> list[int]:
        """The step that each start of the run began at."""
        file = self.folder / "sessions.jsonl"
        return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def resumed_at(self) -> int:
        """The step at which the run first went on; 0: it has not yet."""
        return next((step for step in self.starts if step), 0)

    @property
    def output(self) -> str:
        """The job's log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def metrics(self) -> list[dict]:
        """All lines, without what depends on the clock."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]

    def until(self, what: Callable[[], object], timeout_s: float = 240) -> None:
        """Wait for ``what``; fail, with the log, where it does not come."""
        end = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() > end:
                raise AssertionError(f"job {self.id} is late:\n{self.output}\n{self.cluster.run('squeue')}")
            time.sleep(0.3)

    @property
    def over(self) -> bool:
        """Whether it has left the queue for good."""
        # A finished job is listed for a minute more where it is asked for by number.
        return self.state in ("", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL") and bool(self.ends)

    def cancel(self) -> None:
        """For good."""
        self.cluster.run("scancel", self.id)
