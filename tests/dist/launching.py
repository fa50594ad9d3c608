"""Start real processes the way users do, and never wait for them for ever."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU_LAUNCH = ROOT / "launch" / "accelerate" / "cpu.yaml"
HANGS_S = 1500.0
"""Only a hang takes so long, on a busy machine too."""

FROM_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def start(
    processes: int, *arguments: str, launch_file: Path = CPU_LAUNCH, **environment: str
) -> subprocess.Popen:
    """``accelerate launch`` (or plain python for one process) with a script or ``-m module`` and its arguments."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(launch_file)]
        command += ["--num_processes", str(processes)]
    return spawn([*command, *arguments], **environment)


def spawn(command: Sequence[str], **environment: str) -> subprocess.Popen:
    """Start a command outside of any launcher's world, with standard error in its output.

    Its processes form a group of their own, so that :func:`finish` can end all of them.
    """
    env = {key: value for key, value in os.environ.items() if key not in FROM_A_LAUNCHER}
    # Two cores carry all ranks: more threads than cores only fight each other.
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    env |= {"TORCH_CPP_LOG_LEVEL": "ERROR", **environment}  # as the command line sets it, for workers that import torch first
    return subprocess.Popen(
        command,
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    """Processes that a process has started: of a launcher, its ranks."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def finish(process: subprocess.Popen) -> str:
    """Everything the processes printed; kills all of them, with their stacks on screen, if they hang."""
    try:
        out, _ = process.communicate(timeout=HANGS_S)
        return out
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler prints the stacks
        out, _ = process.communicate(timeout=20)
        raise AssertionError(f"still running after {HANGS_S} s:\n{out}") from None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def until(true: Callable[[], bool], every_s: float = 0.05) -> None:
    """Wait for something to come true."""
    ends_s = time.monotonic() + HANGS_S
    while not true():
        assert time.monotonic() < ends_s, "it never came true"
        time.sleep(every_s)


def run(
    processes: int, *arguments: str, launch_file: Path = CPU_LAUNCH, **environment: str
) -> tuple[int, str]:
    """(exit code, output) of a launch."""
    process = start(processes, *arguments, launch_file=launch_file, **environment)
    out = finish(process)
    return process.returncode, out


def start_ranks(processes: int, *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """The ranks of a world on this machine, by plain python."""
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    return [start(1, *arguments, **world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]


def run_ranks(processes: int, *arguments: str, **environment: str) -> tuple[int, str]:
    """As :func:`run` without a launcher, which takes its time too: (exit code, what each rank printed, in order)."""
    if processes == 1:
        return run(1, *arguments, **environment)
    ranks = start_ranks(processes, *arguments, **environment)
    said = [finish(rank) for rank in ranks]
    return next((rank.returncode for rank in ranks if rank.returncode), 0), "".join(said)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SLOW_IMPORT = """
import os, sys, time

class Slow:
    # Not in find_spec, during which Python lets no other thread import anything.
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and os.environ.get("RANK") == os.environ["SLOW"]:
            from importlib.machinery import ModuleSpec
            return ModuleSpec(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        print("imports", flush=True)
        time.sleep(100)

sys.meta_path.insert(0, Slow())
"""


def slow_imports(folder: Path, rank: int) -> dict[str, str]:
    """The environment in which a rank says ``imports``, and then takes 100 s to import torch, as over a slow network."""
    (folder / "sitecustomize.py").write_text(SLOW_IMPORT)
    return {"PYTHONPATH": f"{folder}:{ROOT}", "SLOW": str(rank)}
