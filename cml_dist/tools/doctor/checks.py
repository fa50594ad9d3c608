"""The checks: functions that yield findings of the machine, of what a run needs, and of the world together.

Each rank calls them; what concerns the machine or the run folder is left to the first rank there.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement

from cml_dist.config.schema import RunConfig
from cml_dist.distributed.env import Launched, idle_nodes
from cml_dist.telemetry import text

if TYPE_CHECKING:
    from cml_dist.distributed.world import World

GIB = 2**30
PACKAGE = "cml-dist"
ALIKE = "install the same on every machine: results differ in their last bits, or ranks do not understand each other"

TAKEN = 0.1
"""Part of a GPU's memory in use, above which somebody else seems to compute there."""

SHARED, SHARED_GIB = "/dev/shm", 0.5
"""With less than that its users run short (Docker gives 64 MiB)."""

REDUCED_BYTES, SLOW_MB_PER_S = 2**24, 50.0

PROBE = ".cml-dist-doctor-"
APPEAR_S = 10.0
"""Network file systems remember for a few seconds that a file was not there."""

Verdict = Literal["ok", "note", "warning", "fault"]


@dataclass
class Case:
    """What is looked at: a configuration (by name; None: a small one stands for it), a run folder, and this process.

    Attributes:
        world: once it is joined.
    """

    config: RunConfig
    configuration: str | None
    run_dir: Path
    here: Launched
    world: World | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; in a report, by all ranks that found the same.

    Attributes:
        check: its name, a word or two.
        verdict: ``ok``; ``note``: worth knowing; ``warning``: works, but something will be lost; ``fault``: a run
            would fail or be wrong.
        value: what was found.
        remedy: what to do about it.
        alike: what to do if the value is not the same everywhere; empty where it may differ.
        ranks, who: who found it; their names where not all found the same.
    """

    check: str
    verdict: Verdict
    value: str
    remedy: str = ""
    alike: str = ""
    ranks: tuple[int, ...] = ()
    who: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.check}: " + (f"{self.who}: " if self.who else "") + self.value + remedy


def judged(check: str, value: str, wrong: bool, remedy: str, verdict: Verdict = "warning", alike: str = "") -> Finding:
    """``ok``; or where something is ``wrong``, the verdict and what to do."""
    return Finding(check, verdict, value, remedy, alike) if wrong else Finding(check, "ok", value, alike=alike)


def by_host(hosts: Iterable[str]) -> str:
    """Where ranks are: ``on n01``, or with how many each ``on n01 (8), n02 (8)``."""
    counts = Counter(hosts)
    return "on " + ", ".join(f"{host} ({count})" if len(counts) > 1 else host for host, count in counts.items())


# --------------------------------------------------------------------------- the machine


def check_versions(case: Case) -> Iterator[Finding]:
    """Python, and every package that the package's own metadata require."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        value = "not installed, only found on the path: what it requires is not known"
        yield Finding(PACKAGE, "warning", value, "pip install . and ask again, or go on if all it needs is there")
        return
    yield Finding(PACKAGE, "ok", metadata["Version"], alike=ALIKE)
    required = [f"python{metadata['Requires-Python'] or ''}", *(importlib.metadata.requires(PACKAGE) or ())]
    for name, bound, marker in ((one.name, one.specifier, one.marker) for one in map(Requirement, required)):
        if marker is not None and not marker.evaluate({"extra": ""}):
            continue
        verdict, remedy = "fault", f"use Python {bound}" if name == "python" else f"pip install '{name}{bound}'"
        try:
            version = platform.python_version() if name == "python" else importlib.metadata.version(name)
            fits = bound.contains(version, prereleases=True)  # 2.6.0+cpu counts as 2.6.0, a pre-release by its number
            value = f"{version} (needs {bound})" if fits else f"{version}, but {bound} is needed"
        except importlib.metadata.PackageNotFoundError:
            fits, value = False, "not installed"
            if marker is not None:
                verdict, remedy = "note", f"for DeepSpeed's strategies: {remedy}"
        yield judged(name, value, not fits, remedy, verdict, ALIKE)


def check_gpu(case: Case) -> Iterator[Finding]:
    """The GPU of this process, and whether its memory is free; where there are too few, joining the world says so."""
    import torch

    processes, number = case.here.local_size, case.here.local_rank
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if case.config.run.device == "cpu" or not count:
        unseen = case.config.run.device != "cpu" and os.path.exists("/dev/nvidia0")
        built = f"torch is built for {torch.version.cuda or 'the CPU alone'}"
        remedy = f"mend the driver or CUDA_VISIBLE_DEVICES ({built}); see nvidia-smi"
        yield judged("GPU", "there, but torch sees none" if unseen else "none is used", unseen, remedy)
    elif number < count:
        free, total = (value / GIB for value in torch.cuda.mem_get_info(number))
        capability = ".".join(map(str, torch.cuda.get_device_capability(number)))
        value = f"{torch.cuda.get_device_name(number)}, {total:.3g} GiB (compute capability {capability})"
        if free < (1 - TAKEN) * total:
            remedy = "see nvidia-smi: another process holds memory; end it, or ask for GPUs of your own"
            yield Finding("GPU", "warning", f"{value}: {free:.3g} GiB are free", remedy)
            return
        idle = f"it is one of {count}; to use all: --num_processes {count}"
        alike = "take machines of the same kind, or the slowest sets the pace"
        yield judged("GPU", value, processes < count, idle, "note", alike)


def check_shared_memory(case: Case) -> Iterator[Finding]:
    """Loader processes, NCCL and gloo talk through it."""
    if case.here.local_rank:
        return
    size, _, free = (value / GIB for value in shutil.disk_usage(SHARED))
    remedy = "enlarge it (docker run --shm-size=8g, or --ipc=host), or set domain.workers=0"
    yield judged("shared memory", f"{free:.3g} GiB free of {size:.3g} GiB in {SHARED}", free < SHARED_GIB, remedy)


def check_slurm(case: Case) -> Iterator[Finding]:
    """The job: its nodes, whether all of them take part, and the time left."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or case.here.rank:
        return
    value = f"{job} on {os.environ.get('SLURM_JOB_NODELIST', '?')}"
    if (end := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():  # since SLURM 22.05
        value += f", {text.duration(int(end) - time.time())} left"
    idle, _, remedy = (idle_nodes() or "").partition(": ")
    yield judged("job", f"{value}; {idle}" if idle else value, bool(idle), remedy)


# --------------------------------------------------------------------------- network and data


def check_second_derivative(case: Case) -> Iterator[Finding]:
    """On the device of the run: second derivatives of the network against differences of its gradient, in float64."""
    from cml_dist.memory.forecast import known_inputs
    from cml_dist.nets.build import make_network
    from cml_dist.nets.guard import check_twice_differentiable
    from cml_dist.run.warm_start import read_start

    if case.here.local_rank:
        return
    inputs, backbone = known_inputs(case.config), case.config.model.backbone
    start = read_start(case.config, warn=lambda fault: None)
    net = make_network(case.config, inputs.input_shape, inputs.output_dim, start=start and start.values)
    size = f"{backbone}, {sum(p.numel() for p in net.parameters()):,} parameters"
    if case.config.method.order != 2:
        yield Finding("second derivative", "ok", f"{size}: not needed, method.order is 1")
        return
    device = "cpu" if case.world is None else case.world.device.type
    check_twice_differentiable(net.to(device), inputs.input_shape, inputs.output_dim, backbone)
    yield Finding("second derivative", "ok", f"right for {size}, on {device}")


def check_data(case: Case) -> Iterator[Finding]:
    """The data of the configuration: there, whole, large enough; one episode of each split is made."""
    from cml_dist.data.base import SPLITS
    from cml_dist.data.build import build_domain
    from cml_dist.data.set_shape import settled_shape
    from cml_dist.data.shard_cache import description, is_remote

    if case.configuration is None or case.here.local_rank:
        return
    domain, root = case.config.domain, getattr(case.config.domain, "root", None)
    if root is not None and is_remote(root):  # fetching the shards is the run's first step
        yield Finding("data", "ok", f"{description(root)[1].name} at {root} answers; it is fetched once a machine")
        return
    seeds = {"train_seed": case.config.run.seed, "eval_seed": case.config.eval.seed}
    made = build_domain(settled_shape(case.config).domain, **seeds, processes=case.here.local_size)
    for split in SPLITS:
        made.episode(split, 0)
    checksum = f", checksum {made.fingerprint()[:12]}" if made.fingerprint() else ""
    value = f"{domain.name}{f' in {root}' if root else ''}: an episode of each split made{checksum}"
    yield Finding("data", "ok", value, alike="copy the same packed set to every machine")


# --------------------------------------------------------------------------- the run folder


def check_run_folder(case: Case) -> Iterator[Finding]:
    """Whether a run can start there, or this one go on."""
    from cml_dist.run.folder import RunFolder

    if case.here.rank:
        return
    folder = RunFolder(case.run_dir.expanduser())
    value = "holds a run" if folder.exists else "holds no run yet"
    if folder.exists and case.configuration is not None:
        folder.check_resumable(case.config)
        value += ", which this configuration resumes"
    yield Finding("run folder", "ok", f"{case.run_dir} {value}")


def share_run_folder(case: Case) -> list[Finding]:
    """Whether all ranks have one folder: rank 0 saves and locks a file there, the others look for it. Collective."""
    from cml_dist.atomic import atomic_file

    world, path, found = case.world, case.run_dir.expanduser().absolute(), []
    assert world is not None
    base = next(folder for folder in (path, *path.parents) if folder.exists())
    file = None
    with ExitStack() as stack:
        if world.is_main:
            try:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=PROBE, dir=base))
                started_s = time.perf_counter()
                with atomic_file(Path(folder, "file")) as fresh:
                    fresh.write_bytes(os.urandom(2**20))
                value = f"1 MiB is on the disk after {1e3 * (time.perf_counter() - started_s):.3g} ms"
                free_gib, file = shutil.disk_usage(base).free / GIB, f"{Path(folder).name}/file"
                remedy = "free some, choose another run.dir, or lower checkpoint.keep_last"
                value += f"; {free_gib:.3g} GiB are free in {base}"
                found = [judged("write and rename", value, free_gib < 1, remedy), *_look_for(base / file, stack, True)]
            except OSError as error:
                remedy = "choose a run.dir that has space and can be written, or mend its permissions or mount"
                what = f"{base} cannot be written: {error.strerror}"
                found = [Finding("write and rename", "fault", what, remedy)]
        file = world.gather(file)[0]
        if not world.is_main and file is not None:
            found = list(_look_for(base / file, stack, False))
        world.gather(None)  # rank 0 keeps the file until all have looked
    return found


def _look_for(file: Path, stack: ExitStack, first: bool) -> Iterator[Finding]:
    """Whether a rank finds the file, and whether the first one gets a lock until the end of ``stack``, and no other."""
    end_s = time.monotonic() + APPEAR_S
    while not file.exists():
        if time.monotonic() > end_s:
            remedy = "put run.dir on a file system that all machines share, by its full path"
            what = f"{file.parents[1]} is not the folder that rank 0 writes to"
            yield Finding("same folder", "fault", what, remedy)
            return
        time.sleep(0.1)
    yield Finding("same folder", "ok", "the ranks see what rank 0 writes")
    value = "flock does not keep other ranks out"
    try:
        fcntl.flock(stack.enter_context(open(file, "r+")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        good = first
    except BlockingIOError:
        good = not first
    except OSError as error:
        good, value = False, f"flock does not work: {error.strerror}"
    remedy = "mount it with flock (Lustre: -o flock, NFS: not nolock): else nothing keeps a second trainer out"
    yield judged("locks", "flock works" if good else value, not good, remedy)


# --------------------------------------------------------------------------- the world


def check_world(world: World) -> Iterator[Finding]:
    """Who is there, and the time of a sum over all ranks, by what sums gradients. Collective: all ranks."""
    import torch

    if world.size == 1:
        yield Finding("world", "ok", f"one process alone, on {world.device}")
        return
    backend = "gloo" if world.device.type == "cpu" else "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    value = f"all {world.size} processes joined by {backend} {by_host(world.gather(socket.gethostname()))}"
    yield Finding("world", "ok", value, alike=ALIKE)
    world.heartbeat.beat("the all-reduce")
    times, wrong = [], False
    for _ in range(4):
        data = torch.full((REDUCED_BYTES // 4,), world.rank + 1.0, device=world.device)
        with world.heartbeat.waiting():
            torch.distributed.barrier()
            started_s = time.perf_counter()
            torch.distributed.all_reduce(data)
            data[0].item()  # waits for a GPU
            times.append(world.max(time.perf_counter() - started_s))
        wrong = wrong or bool((data != world.size * (world.size + 1) / 2).any())
    seconds = statistics.median(times[1:])  # the first one connects
    value = f"{REDUCED_BYTES >> 20} MiB in {1e3 * seconds:.3g} ms ({REDUCED_BYTES / seconds / 1e6:,.0f} MB/s)"
    if world.max(float(wrong)):
        remedy = "do not train on this: update the driver, NCCL or torch; try run.device=cpu"
        yield Finding("all-reduce", "fault", f"{value}, with a WRONG sum", remedy)
        return
    remedy = "slow for gradients; name the fast network: GLOO_SOCKET_IFNAME=... (NCCL_SOCKET_IFNAME=...)"
    yield judged("all-reduce", value, REDUCED_BYTES / seconds / 1e6 < SLOW_MB_PER_S, remedy)
