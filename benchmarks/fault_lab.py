"""Runs disturbed on purpose: start a world, strike it, see it end, start it again, compare with a run in peace.

The kinds of faults are in ``fault_cases.py``; ``fault_campaign.py`` draws and records them, and the tests play a few.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch

from cml_dist.run import checkpoint as checkpoints
from cml_dist.telemetry.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "launch/accelerate/cpu.yaml")
FROM_A_LAUNCHER = re.compile("RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_.*|GROUP_.*|TORCHELASTIC_.*|SLURM_.*")
TAG = "FAULT_CAMPAIGN_LAUNCH"
"""Environment variable by which every process of a launch is known, whoever its parent is."""
NODE = "FAULT_CAMPAIGN_NODE"
TIMES = ("seconds", "episodes_per_s", "peak_memory_gib")
"""What a line of metrics.jsonl may have differently in another run of the same."""

STEPS, SAVED_EVERY, VALIDATED_EVERY = 60, 5, 20
EXIT_S = 60.0
"""The time within which a disturbed run must have ended (issue 4, section 3)."""
START_S, FINISH_S = 600.0, 1200.0
"""Time limits of the campaign itself, generous: the machine may be busy."""

COMMON = (
    f"train.steps={STEPS}", "train.episodes_per_step=3", f"checkpoint.every={SAVED_EVERY}", "parallel.threads=1",
    f"eval.every={VALIDATED_EVERY}", "run.log_every=10", "parallel.join_timeout_s=30",
)  # fmt: skip
SINUSOID = (
    "sinusoid", "domain.shots=5", "domain.queries=5", "model.hidden=[64, 64]", "method.inner_steps=3",
    "eval.val_episodes=150", "eval.episodes=150",
)  # fmt: skip
IMAGES = (
    "glyphs", "domain.name=images", "domain.ways=3", "domain.shots=2", "domain.queries=2", "domain.memory_gib=0",
    "model.filters=4", "eval.val_episodes=20", "eval.episodes=20",
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """A world, and what it trains.

    Attributes:
        processes: in all; nodes: launchers ("machines") that share them equally.
        strategy: ``parallel.strategy``.
        images: whether it streams a packed set instead of drawing sinusoids.
        launcher: ``torchrun``, ``accelerate``, or ``python``: none.
        restarts: how often the launcher may start the ranks again by itself.
    """

    processes: int = 2
    nodes: int = 1
    strategy: str = "auto"
    images: bool = False
    launcher: str = "torchrun"
    restarts: int = 0

    @property
    def values(self) -> tuple[int, str, bool]:
        """What the values of the run depend on: its reference is the same for any launcher."""
        return self.processes, self.strategy, self.images

    def commands(self, port: int) -> list[tuple[list[str], dict[str, str]]]:
        """What starts the world: (command, more of the environment) of each launcher, or of each rank without one."""
        if self.launcher == "python":
            return [([sys.executable], self._rank(rank, port)) for rank in range(self.processes)]
        if self.launcher == "torchrun":
            words, each = "nnodes node_rank master_addr master_port", self.processes // self.nodes
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(each)]
        else:
            words, each = "num_machines machine_rank main_process_ip main_process_port", self.processes
            command = [sys.executable, *ACCELERATE, "--num_processes", str(each)]
        command += ["--max_restarts", str(self.restarts)]
        if self.nodes == 1:
            here = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"] if self.launcher == "torchrun" else []
            return [([*command, *here], {NODE: "0"})]
        made = []
        for node in range(self.nodes):
            values = (self.nodes, node, "127.0.0.1", port)
            options = [x for word, value in zip(words.split(), values, strict=True) for x in (f"--{word}", str(value))]
            # Two machines on one: their way to each other is the loopback, which the trainer would refuse.
            made.append(([*command, *options], {NODE: str(node), "GLOO_SOCKET_IFNAME": "lo"}))
        return made

    def _rank(self, rank: int, port: int) -> dict[str, str]:
        """The environment of a rank that no launcher starts."""
        if self.processes == 1:
            return {NODE: "0"}
        world = {"WORLD_SIZE": self.processes, "LOCAL_WORLD_SIZE": self.processes, "MASTER_PORT": port}
        world |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", NODE: 0}
        return {name: str(value) for name, value in world.items()}


SETUPS = {
    "ddp": Setup(),
    "plain": Setup(launcher="python"),
    "zero2": Setup(strategy="zero2", launcher="accelerate"),
    "single": Setup(processes=1, launcher="python"),
    "nodes": Setup(nodes=2),
    "images": Setup(images=True),
    "elastic": Setup(launcher="accelerate", restarts=3),
}


class Violation(AssertionError):
    """Something that must hold after a fault, and did not."""


# --------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """A process of a launch.

    Attributes:
        born: its start time in ticks: with the pid it names a process for good.
        rank: of a trainer; None for launchers and for helpers of trainers.
    """

    pid: int
    born: int
    parent: int
    node: int
    rank: int | None


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent, start time) of a process, or None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[19])


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in raw.decode(errors="replace").split("\0") if "=" in entry)


class Launch:
    """One start of a run: its launchers, their processes, and what they print."""

    def __init__(self, lab: Lab, number: int) -> None:
        self.lab, self.setup, self.tag = lab, lab.setup, uuid.uuid4().hex
        self.began = time.monotonic()
        self.steps_before = lab.steps_done()
        self._seen: dict[int, Process] = {}
        commands = self.setup.commands(_free_port())
        self._logs = [lab.work / f"launch-{number}-{i}.log" for i in range(len(commands))]
        environment = {k: v for k, v in os.environ.items() if not FROM_A_LAUNCHER.fullmatch(k)}
        environment |= {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(lab.work),
            TAG: self.tag,
        }
        self.launchers: list[subprocess.Popen] = []
        for log, (command, more) in zip(self._logs, commands, strict=True):
            with open(log, "ab") as out:
                self.launchers.append(
                    subprocess.Popen(
                        [*command, "-m", "cml_dist", "train", *lab.words],
                        env={**environment, **more},
                        cwd=ROOT,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )

    def processes(self) -> list[Process]:
        """All that live now, and what is left of those that died (zombies), oldest first."""
        for popen in self.launchers:
            popen.poll()  # reaps it: a launcher is our child
        launchers = {popen.pid for popen in self.launchers}
        for name in os.listdir("/proc"):
            pid = int(name) if name.isdigit() else 0
            known = self._seen.get(pid)
            # Between its fork and its exec a trainer has its launcher's environment: it is looked at again.
            if not pid or (known is not None and (known.rank is not None or known.parent not in launchers)):
                continue
            environment = _environment(pid)
            if environment.get(TAG) == self.tag and (stat := _stat(pid)) is not None:
                # A trainer is started by us or is the child of a launcher; its own children inherit its RANK.
                alone = self.setup.launcher == "python"
                trainer = pid in launchers if alone else stat[1] in launchers and "LOCAL_RANK" in environment
                rank = int(environment.get("RANK", 0)) if trainer else None
                self._seen[pid] = Process(pid, stat[2], stat[1], int(environment.get(NODE, 0)), rank)
        gone = [pid for pid, p in self._seen.items() if (stat := _stat(pid)) is None or stat[2] != p.born]
        for pid in gone:
            del self._seen[pid]
        return sorted(self._seen.values(), key=lambda p: p.born)

    def trainer(self, rank: int, timeout_s: float = START_S) -> Process:
        """The process of a rank (of its newest start), once it is there."""

        def find() -> Process | None:
            return next((p for p in reversed(self.processes()) if p.rank == rank), None)

        return self.wait(find, f"rank {rank}", timeout_s, poll_s=0.05)

    def signal(self, process: Process, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)

    def state(self, process: Process) -> str:
        """R, S, T (stopped), Z and so on, as in /proc; X for a process that is gone."""
        stat = _stat(process.pid)
        return "X" if stat is None or stat[2] != process.born else stat[0]

    def freeze(self, process: Process) -> bool:
        """Stop a process where it stands; False if it has ended instead."""
        self.signal(process, signal.SIGSTOP)
        while (state := self.state(process)) not in "TtXZ":
            time.sleep(0.0002)
        return state in "Tt"

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = START_S, poll_s: float = 0.002):
        """The first true value of ``condition``; a violation if the launch ends before, or the time does."""
        until = time.monotonic() + timeout_s
        while not (value := condition()):
            if all(popen.poll() is not None for popen in self.launchers):
                if value := condition():
                    return value
                raise Violation(f"the launch ended before there was {what}:\n{self.tail()}")
            if time.monotonic() > until:
                raise Violation(f"{timeout_s:.0f} s passed without {what}:\n{self.tail()}")
            time.sleep(poll_s)
        return value

    def wait_for_step(self, step: int) -> None:
        """Wait until metrics.jsonl has a step, of this start."""
        self.wait(lambda: self.lab.steps_done() >= step, f"step {step}")

    def gone(self, timeout_s: float) -> bool:
        """Wait until no process is left, dead ones that nobody buried included; whether that came in time."""
        until = time.monotonic() + timeout_s
        while self.processes() or None in self.codes:  # a child of ours has no environment yet before its exec
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    @property
    def output(self) -> str:
        """All that its processes printed, launcher by launcher."""
        return "".join(log.read_text(errors="replace") for log in self._logs)

    def tail(self, characters: int = 3000) -> str:
        return self.output[-characters:]

    @property
    def codes(self) -> list[int | None]:
        return [popen.poll() for popen in self.launchers]

    def end(self) -> None:
        """Kill whatever is left, with no regard."""
        until = time.monotonic() + 10
        while ((left := self.processes()) or None in self.codes) and time.monotonic() < until:
            for popen in self.launchers:
                popen.kill()
            for process in left:
                self.signal(process, signal.SIGKILL)
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --------------------------------------------------------------------------- one disturbed run


@dataclass
class Lab:
    """The place of one case: its run folder, its starts, and what was measured.

    Attributes:
        work: an empty folder of its own.
        reference: the run folder of the undisturbed run of the same world.
        did: what was done, in words.
        exit_s: seconds from each strike until no process was left.
        refused_s: seconds from each start that was refused until no process was left.
        lost: meta-steps that were computed and had to be computed again, of each strike.
        starts: of the run, refused ones not counted.
    """

    setup: Setup
    work: Path
    reference: Path | None
    data: Path | None = None
    did: list[str] = field(default_factory=list)
    exit_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    starts: int = 0
    _launches: list[Launch] = field(default_factory=list)
    _cleanup: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.work / "run"

    @property
    def words(self) -> list[str]:
        """Arguments of ``cml-dist train``: the same for each start."""
        domain = (*IMAGES, f"domain.root={self.data}") if self.setup.images else SINUSOID
        words = (*domain, *COMMON)
        return [*words, f"parallel.strategy={self.setup.strategy}", f"run.dir={self.folder}"]

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def steps_done(self) -> int:
        """Whole lines of metrics.jsonl."""
        with suppress(OSError):
            return self.metrics.read_bytes().count(b"\n")
        return 0

    def start(self) -> Launch:
        self._launches.append(Launch(self, len(self._launches)))
        return self._launches[-1]

    def note(self, words: str) -> None:
        self.did.append(words)

    def dies(self, launch: Launch, struck: float, *says: str, within_s: float = EXIT_S) -> None:
        """All processes end in time, the launch as a failure, and what they printed has each of ``says`` (regex)."""
        if not launch.gone(within_s):
            left = [f"pid {p.pid} (rank {p.rank}, {launch.state(p)})" for p in launch.processes()]
            stacks = launch.tail()
            launch.end()
            raise Violation(f"{within_s:.0f} s after the fault there still was {', '.join(left)}:\n{stacks}")
        self.exit_s.append(time.monotonic() - struck)
        if launch.codes == [0] * len(launch.codes):
            raise Violation(f"the disturbed launch ended as a success (exit code 0):\n{launch.tail()}")
        for words in says:
            if not re.search(words, launch.output):
                raise Violation(f"nobody said {words!r}:\n{launch.tail()}")

    def refuses(self, launch: Launch, *says: str, within_s: float = EXIT_S) -> None:
        """A start that must not succeed ends by itself, with a clear line and no traceback."""
        self.dies(launch, launch.began, *says, within_s=within_s)
        self.refused_s.append(self.exit_s.pop())
        if 'cml_dist/cli.py", line' in launch.output:  # the launcher's own traceback cannot be helped
            raise Violation(f"a traceback instead of one clear line:\n{launch.tail()}")

    def resumes(self, *, at_most_lost: int = SAVED_EVERY, says: tuple[str, ...] = ()) -> None:
        """The same command goes on from the newest good checkpoint, finishes, and is the undisturbed run."""
        computed, newest = self.steps_done(), newest_good_step(self.checkpoints)
        if computed - newest > at_most_lost:
            raise Violation(f"{computed} steps were computed, but the newest good checkpoint is of step {newest}")
        self.lost.append(max(0, computed - newest))
        launch = self.start()
        self.finishes(launch, says=says)
        resumed = self.sessions()[-1]["step"]
        if resumed != newest:
            raise Violation(f"resumed at step {resumed}, but the newest good checkpoint is of step {newest}")

    def finishes(self, launch: Launch, *, says: tuple[str, ...] = ()) -> None:
        """A launch ends by itself, as a success, and the run is the undisturbed one."""
        if not launch.gone(FINISH_S):
            tail = launch.tail()
            launch.end()
            raise Violation(f"not finished {FINISH_S:.0f} s after the start:\n{tail}")
        if launch.codes != [0] * len(launch.codes):
            raise Violation(f"the launch failed (exit codes {launch.codes}):\n{launch.tail()}")
        for words in says:
            if not re.search(words, launch.output):
                raise Violation(f"nobody said {words!r}:\n{launch.tail()}")
        self.starts = len(self.sessions())
        if self.reference is not None and (found := differences(self.folder, self.reference)):
            raise Violation(f"not the undisturbed run: {'; '.join(found)}")

    def sessions(self) -> list[dict]:
        """The recorded starts; a torn last line (a kill while it was written) is passed over."""
        found = []
        with suppress(OSError):
            for line in (self.folder / "sessions.jsonl").read_text().splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def at_the_end(self, action: Callable[[], None]) -> None:
        self._cleanup.append(action)

    def close(self) -> None:
        """End what still runs, and undo what was done to the file system."""
        for launch in self._launches:
            launch.end()
        for action in reversed(self._cleanup):
            with suppress(Exception):
                action()


def newest_good_step(folder: Path) -> int:
    """Step of the newest checkpoint that is whole; 0 where there is none."""
    try:
        found = checkpoints.load_newest(folder)
    except checkpoints.CheckpointError:
        return 0
    return 0 if found is None else found.step


def differences(folder: Path, reference: Path) -> list[str]:
    """By what a finished run differs from the undisturbed one, to the bit; empty if by nothing."""
    found = []
    lines, expected = (_curve(f / "metrics.jsonl") for f in (folder, reference))
    if lines != expected:
        first = next((i for i, (a, b) in enumerate(zip(lines, expected, strict=False)) if a != b), None)
        found.append(f"metrics.jsonl has {len(lines)} of {len(expected)} lines" if first is None else
                     f"metrics.jsonl differs first in line {first + 1}: {lines[first]} {expected[first]}")  # fmt: skip
    for name in ("validation.jsonl", "eval.json"):
        if (folder / name).read_bytes() != (reference / name).read_bytes():
            found.append(f"{name}: {(folder / name).read_text()} {(reference / name).read_text()}")
    scores, expected_scores = (np.load(f / "eval_scores.npz") for f in (folder, reference))
    if scores.files != expected_scores.files or any((scores[k] != expected_scores[k]).any() for k in scores.files):
        found.append("eval_scores.npz differs")
    last, expected_last = (checkpoints.load(checkpoints.path_of(f / "checkpoints", STEPS)) for f in (folder, reference))
    if last.state != expected_last.state or last.layout != expected_last.layout:
        found.append(f"the last checkpoint's state is {last.state}, not {expected_last.state}")
    elif any(not torch.equal(last.read(name), expected_last.read(name)) for name in last.layout):
        found.append("the last checkpoint's tensors differ")
    for path in sorted((reference / "export").glob("*.safetensors")):
        if not (folder / "export" / path.name).is_file():
            found.append(f"{path.name} was not exported")
        elif (folder / "export" / path.name).read_bytes() != path.read_bytes():
            found.append(f"the exported {path.name} differs")
    return found


def _curve(path: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(path)]


# --------------------------------------------------------------------------- references, and playing a case


class References:
    """Undisturbed runs, one for each world that a case needs, made when it is first asked for."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def folder(self, setup: Setup) -> Path:
        """The run folder of the undisturbed run."""
        processes, strategy, images = setup.values
        world = Setup(processes, strategy=strategy, images=images, launcher="accelerate" if processes > 1 else "python")
        lab = Lab(world, self.work / "-".join(map(str, setup.values)), None, self.data(setup))
        if not (lab.folder / "export").is_dir():  # of this campaign, or kept from an earlier one in the same place
            lab.work.mkdir(parents=True)
            try:
                lab.finishes(lab.start())
            finally:
                lab.close()
        return lab.folder

    def data(self, setup: Setup) -> Path | None:
        """A packed image set of many small shards, for the worlds that stream one."""
        if not setup.images:
            return None
        dest = self.work / "set"
        if not dest.exists():
            sys.path.insert(0, str(ROOT / "tests" / "unit"))
            from image_sets import write_set

            dest.parent.mkdir(parents=True, exist_ok=True)
            write_set(dest, images=8, size=20, channels=1, shard_size_mib=0.008)
        return dest


@dataclass(frozen=True)
class Result:
    """What came of a case; ``violation`` is empty where everything held."""

    kind: str
    setup: str
    seed: str
    did: str
    exit_s: list[float]
    refused_s: list[float]
    lost: list[int]
    starts: int
    seconds: float
    violation: str


def play(
    kind: str,
    case: Callable[[Lab, random.Random], None],
    setup: str,
    seed: str,
    work: Path,
    references: References,
    *,
    keep: bool = False,
) -> Result:
    """Play one case in ``work`` (made if need be, and removed again unless ``keep`` or something did not hold)."""
    began = time.monotonic()
    world = SETUPS[setup]
    reference, data = references.folder(world), references.data(world)
    work.mkdir(parents=True, exist_ok=True)
    if data is not None:  # a copy of its own, which it may damage
        data = Path(shutil.copytree(data, work / "set"))
    lab, violation = Lab(world, work, reference, data), ""
    try:
        case(lab, random.Random(seed))
    except Violation as error:
        violation = str(error)
    finally:
        lab.close()
    if not keep and not violation:
        shutil.rmtree(work)
    seconds = time.monotonic() - began
    did = "; ".join(lab.did)
    return Result(kind, setup, seed, did, lab.exit_s, lab.refused_s, lab.lost, lab.starts, seconds, violation)


@cache
def may_mount() -> bool:
    """Whether this process may mount file systems: root, with the capability (containers often lack it)."""
    with tempfile.TemporaryDirectory() as place:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode == 0
        if mounted:
            subprocess.run(["umount", place], check=True)
    return mounted


@contextmanager
def small_disk(lab: Lab, mib: int) -> Iterator[Path]:
    """A file system of ``mib`` MiB that holds the run folder (see :func:`may_mount`)."""
    place = lab.work / "disk"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)], check=True)
    lab.at_the_end(lambda: subprocess.run(["umount", "-l", str(place)], check=True))
    lab.folder = place / "run"
    yield place
