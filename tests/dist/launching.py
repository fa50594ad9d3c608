"""Start real processes the way users do, and never wait for them for ever."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

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


def alone_on_cpus() -> dict[str, str]:
    """The environment outside of any launcher's world. Two cores carry all ranks: more threads would fight each other."""
    env = {key: value for key, value in os.environ.items() if key not in FROM_A_LAUNCHER}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return env | {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as the command line sets it, for workers that import torch first


def spawn(command: Sequence[str], **environment: str) -> subprocess.Popen:
    """Start a command outside of any launcher's world, with standard error in its output.

    Its processes form a group of their own, so that :func:`finish` can end all of them.
    """
    return subprocess.Popen(
        command,
        env=alone_on_cpus() | environment,
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


def world_of(processes: int) -> list[dict[str, str]]:
    """The variables of each rank of a world on this machine."""
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start_ranks(processes: int, *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """The ranks of a world on this machine, by plain python."""
    return [start(1, *arguments, **world, **environment) for world in world_of(processes)]


def run_ranks(processes: int, *arguments: str, **environment: str) -> tuple[int, str]:
    """As :func:`run` by ranks off :data:`FORKS`, without a launcher: (exit code, what each rank printed, in order)."""
    worlds: list[dict[str, str]] = [{}] if processes == 1 else world_of(processes)
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, str(rank)) for rank in range(processes)]
        ranks: list[BaseProcess] = []
        for out, world in zip(said, worlds, strict=True):
            ranks.append(FORKS.Process(target=become, args=(arguments, alone_on_cpus() | world | environment, out)))
            with mock.patch.dict(os.environ, alone_on_cpus()):  # of the server too, which the first one starts
                ranks[-1].start()
        try:
            ends_s = time.monotonic() + HANGS_S
            while (hang := [rank for rank in ranks if still_runs(rank)]) and time.monotonic() < ends_s:
                time.sleep(0.05)
            for rank in hang:
                os.killpg(rank.pid, signal.SIGABRT)  # faulthandler prints the stacks
            for rank in ranks:
                rank.join(20)
        finally:
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
        out = "".join(path.read_text() for path in said)
        assert not hang, f"still running after {HANGS_S} s:\n{out}"
        return next((rank.exitcode for rank in ranks if rank.exitcode), 0), out


def still_runs(rank: BaseProcess) -> bool:
    """Whether there is still a rank, or a process of its group: what it has started."""
    try:
        os.killpg(rank.pid, 0)
    except ProcessLookupError:
        return rank.is_alive()  # it has no group of its own yet
    return True


FORKS = multiprocessing.get_context("forkserver")
"""A process that has imported what every rank imports first, which takes seconds of CPU time each, and forks.

Where to import from is as in the tests' own process. DeepSpeed is not among it: what it says as it is imported is tested.
"""
FORKS.set_forkserver_preload(["torch._dynamo", "torch._inductor.config", "accelerate", "timm"])


def become(arguments: Sequence[str], environment: dict[str, str], out: Path) -> None:
    """What ``python ARGUMENTS`` would be, with its output in a file."""
    os.setsid()
    with open(out, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # loaders by the platform's own method, as in any process
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    faulthandler.enable()
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


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
