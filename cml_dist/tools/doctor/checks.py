"""The checks: functions that yield findings, of the machine, of what a run needs, and of the world together.

Each rank calls them; what concerns the machine or the run folder is left to the first rank there.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from packaging.requirements import Requirement

from cml_dist.data.free_memory import available_bytes, limit_bytes
from cml_dist.distributed.env import idle_nodes
from cml_dist.telemetry import text
from cml_dist.tools.doctor.findings import Case, Finding, by_host, judged

if TYPE_CHECKING:
    from cml_dist.distributed.world import World

GIB = 2**30
PACKAGE = "cml-dist"
ALIKE = "install the same on every machine: results differ in their last bits, or ranks do not understand each other"

PROCESS_GIB = 1.5
"""Memory that a process takes with torch and its libraries, before any network."""

TAKEN = 0.1
"""Part of a GPU's memory in use, above which somebody else seems to compute there."""

SHARED, SHARED_GIB = "/dev/shm", 0.5
"""Loader processes, NCCL and gloo talk through it; with less than that they run short (Docker gives 64 MiB)."""

REDUCED_BYTES, SLOW_MB_PER_S = 2**24, 50.0

PROBE = ".cml-dist-doctor-"
SEEN = Finding("same folder", "ok", "the ranks see what rank 0 writes")
APPEAR_S = 10.0
"""Network file systems remember for a few seconds that a file was not there."""

NO_LOCKS = (
    "mount it with flock (Lustre: -o flock, NFS: not nolock): else nothing keeps a second trainer out of the folder"
)

# --------------------------------------------------------------------------- the machine


def check_versions(case: Case) -> Iterator[Finding]:
    """Python, and every package that the package's own metadata require, with those of the DeepSpeed extra."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        value = "not installed, only found on the path: what it requires is not known"
        yield Finding(PACKAGE, "warning", value, "pip install . and ask again, or go on if all it needs is there")
        return
    yield Finding(PACKAGE, "ok", metadata["Version"], alike=ALIKE)
    required = [f"python{metadata['Requires-Python'] or ''}", *(importlib.metadata.requires(PACKAGE) or ())]
    for name, bound, marker in ((one.name, one.specifier, one.marker) for one in map(Requirement, required)):
        if marker is not None and not marker.evaluate({"extra": "deepspeed"}):
            continue
        verdict, remedy = "fault", f"use Python {bound}" if name == "python" else f"pip install '{name}{bound}'"
        try:
            version = platform.python_version() if name == "python" else importlib.metadata.version(name)
            fits = bound.contains(version, prereleases=True)  # 2.6.0+cpu counts as 2.6.0, a pre-release by its number
            value = f"{version} (needs {bound})" if fits else f"{version}, but {bound} is needed"
        except importlib.metadata.PackageNotFoundError:
            fits, value = False, "not installed"
            if marker is not None:
                verdict, remedy = "note", f"for DeepSpeed's strategies: pip install '{PACKAGE}[deepspeed]'"
        yield judged(name, value, not fits, remedy, verdict, ALIKE)


def check_deepspeed(case: Case) -> Iterator[Finding]:
    """Whether DeepSpeed can be imported; and its C++ operators that were built ahead, for code of the user's own."""
    if case.here.local_rank or importlib.util.find_spec("deepspeed") is None:
        return  # check_versions says that it is absent
    import torch

    from cml_dist.distributed.world import import_deepspeed

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import_deepspeed()
    from deepspeed.git_version_info import accelerator_name, installed_ops

    ahead = ", ".join(sorted(name for name, built in installed_ops.items() if built))
    operators = f"built ahead for {accelerator_name}: {ahead}" if ahead else "none built ahead"
    yield Finding("DeepSpeed", "ok", f"can be imported; C++ operators (a run uses none): {operators}", alike=ALIKE)


def check_gpu(case: Case) -> Iterator[Finding]:
    """The GPU of this process, and whether its memory is free."""
    import torch

    wanted, processes, number = case.config.run.device, case.here.local_size, case.here.local_rank
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not count and not os.path.exists("/dev/nvidia0")):
        yield Finding("GPU", "ok", "not used: run.device is cpu" if wanted == "cpu" else "none: the CPU computes")
    elif number >= count:
        value = f"torch, built for {torch.version.cuda or 'the CPU alone'}, sees {count}, processes here: {processes}"
        value += f" (CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
        verdict = "fault" if count or wanted == "cuda" else "warning"
        yield Finding("GPU", verdict, value, "ask for a GPU a process, or set run.device=cpu; see nvidia-smi")
    else:
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


def check_memory(case: Case) -> Iterator[Finding]:
    """Cores and memory, as far as control groups (containers, SLURM) let this machine's processes have them."""
    if case.here.local_rank:
        return
    processes, free = case.here.local_size, available_bytes() / GIB
    total = (limit_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / GIB
    value = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {free:.3g} GiB free of {total:.3g} GiB"
    remedy = f"{processes} x {PROCESS_GIB} GiB go before any network: start fewer, or ask for more (#SBATCH --mem)"
    yield judged("CPU", value, free < processes * PROCESS_GIB, remedy)
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

    if case.here.local_rank:
        return
    inputs, backbone = known_inputs(case.config), case.config.model.backbone
    net = make_network(case.config, inputs.shape, inputs.output_dim)
    size = f"{backbone}, {sum(p.numel() for p in net.parameters()):,} parameters"
    if case.config.method.order != 2:
        yield Finding("second derivative", "ok", f"{size}: not needed, method.order is 1")
        return
    device = "cpu" if case.world is None else case.world.device.type
    check_twice_differentiable(net.to(device), inputs.shape, inputs.output_dim, backbone)
    yield Finding("second derivative", "ok", f"right for {size}, on {device}")


def check_data(case: Case) -> Iterator[Finding]:
    """The data of the configuration: there, whole, large enough; one episode of each split is made."""
    from cml_dist.data.base import SPLITS
    from cml_dist.data.build import build_domain
    from cml_dist.data.shard_cache import description, is_remote

    if case.configuration is None or case.here.local_rank:
        return
    domain, root = case.config.domain, getattr(case.config.domain, "root", None)
    if root is not None and is_remote(root):  # fetching the shards is the run's first step
        yield Finding("data", "ok", f"{description(root).name} at {root} answers; it is fetched once a machine")
        return
    seeds = {"train_seed": case.config.run.seed, "eval_seed": case.config.eval.seed}
    made = build_domain(domain, **seeds, processes=case.here.local_size)
    for split in SPLITS:
        made.episode(split, 0)
    checksum = f", checksum {made.fingerprint()[:12]}" if made.fingerprint() else ""
    value = f"{domain.name}{f' in {root}' if root else ''}: an episode of each split made{checksum}"
    yield Finding("data", "ok", value, alike="copy the same packed set to every machine")


# --------------------------------------------------------------------------- the run folder


def check_run_folder(case: Case) -> Iterator[Finding]:
    """Whether a run can start or go on there: whether a save works on its disk, and what it holds."""
    from cml_dist.atomic import atomic_file
    from cml_dist.run.folder import RunFolder

    if case.here.rank:
        return
    base, folder = existing(case.run_dir), RunFolder(case.run_dir.expanduser())
    if not base.is_dir():
        yield Finding("run folder", "fault", f"{base} is no folder", "choose another run.dir")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=PROBE, dir=base) as probe:
            started_s = time.perf_counter()
            with atomic_file(Path(probe, "file")) as file:
                file.write_bytes(os.urandom(2**20))
            seconds = time.perf_counter() - started_s
        free_gib = shutil.disk_usage(base).free / GIB
        value = f"1 MiB is on the disk after {1e3 * seconds:.3g} ms; {free_gib:.3g} GiB are free in {base}"
        remedy = "free some, choose another run.dir, or lower checkpoint.keep_last"
        yield judged("write and rename", value, free_gib < 1, remedy)
    except OSError as error:
        remedy = "choose a run.dir that has space and can be written, or mend its permissions or mount"
        yield Finding("write and rename", "fault", f"{base} cannot be written: {error.strerror}", remedy)
    value = "holds a run" if folder.exists else "holds no run yet"
    if folder.exists and case.configuration is not None:
        folder.check_resumable(case.config)
        value += ", which this configuration resumes"
    yield Finding("run folder", "ok", f"{case.run_dir} {value}")


def existing(run_dir: Path) -> Path:
    """Where to try things out: the run folder, or the nearest one above that is there."""
    folder = run_dir.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def see_run_folder(case: Case) -> list[Finding]:
    """Whether all ranks have one run folder: rank 0 writes and locks a file there, the others look for it.

    Collective: all ranks.
    """
    world, folder = case.world, existing(case.run_dir)
    assert world is not None
    name, found = None, []
    with ExitStack() as stack:
        if world.is_main:
            with suppress(OSError):  # check_run_folder says why
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=PROBE, dir=folder))
                name, found = Path(file.name).name, [SEEN, _lock(file, first=True)]
        name = world.gather(name)[0]
        if not world.is_main and name is not None:
            found = list(_look_for(folder / name))
        world.gather(None)  # rank 0 keeps the file until all have looked
    return found


def _look_for(path: Path) -> Iterator[Finding]:
    """What another rank finds of the file that rank 0 has written and locked."""
    end_s = time.monotonic() + APPEAR_S
    while not path.exists():
        if time.monotonic() > end_s:
            remedy = "put run.dir on a file system that all machines share, by its full path"
            yield Finding("same folder", "fault", f"{path.parent} is not the folder that rank 0 writes to", remedy)
            return
        time.sleep(0.1)
    yield SEEN
    with open(path, "r+") as file:
        yield _lock(file, first=False)


def _lock(file: IO, first: bool) -> Finding:
    """Whether the first process gets a lock, and no other."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        good = first
    except BlockingIOError:
        good = not first
    except OSError as error:
        return Finding("locks", "warning", f"flock does not work: {error.strerror}", NO_LOCKS)
    return judged("locks", "flock works" if good else "flock does not keep other ranks out", not good, NO_LOCKS)


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
