"""What the run needs: a network that can be differentiated twice, its data, and a folder that keeps what is saved."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from cml_dist.errors import CmlError
from cml_dist.tools.doctor.findings import GIB, Case, Finding

PROBE = ".cml-dist-doctor-"
SEEN = Finding("same folder", "ok", "the ranks see what rank 0 writes")
APPEAR_S = 10.0
"""Network file systems remember for a few seconds that a file was not there."""

NO_LOCKS = (
    "mount it with flock (Lustre: -o flock, NFS: not nolock): else nothing keeps a second trainer out of the folder"
)

# --------------------------------------------------------------------------- network and data


def check_second_derivative(case: Case) -> Iterator[Finding]:
    """On the device of the run: second derivatives of the network against differences of its gradient, in float64."""
    from cml_dist.memory.forecast import known_inputs
    from cml_dist.nets.build import make_network
    from cml_dist.nets.guard import check_twice_differentiable

    inputs, backbone = known_inputs(case.config), case.config.model.backbone
    net = make_network(case.config, inputs.input_shape, inputs.output_dim)
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
    from cml_dist.data.shard_cache import description, is_remote

    if case.configuration is None:
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
    """Whether a run can start or go on there: its space, whether a save works on its disk, and what it holds."""
    from cml_dist.run.checkpoint import steps_in
    from cml_dist.run.folder import RunFolder

    base, folder = existing(case.run_dir), RunFolder(case.run_dir.expanduser())
    if not base.is_dir():
        yield Finding("run folder", "fault", f"{base} is no folder", "choose another run.dir")
        return
    yield _space(case, base)
    try:
        with tempfile.TemporaryDirectory(prefix=PROBE, dir=base) as probe:
            yield _write(Path(probe))
    except OSError as error:
        remedy = "choose a run.dir that can be written, or mend its permissions or mount"
        yield Finding("write and rename", "fault", f"{base} cannot be written: {error.strerror}", remedy)
    value = "holds no run yet"
    if folder.exists:
        steps = steps_in(folder.checkpoints)
        value = "holds a run" + (f" with a checkpoint of step {steps[-1]}" if steps else "")
        if case.configuration is not None:
            folder.check_resumable(case.config)
            value += ", which this configuration resumes"
    yield Finding("run folder", "ok", f"{case.run_dir} {value}", data={"path": str(base)})


def existing(run_dir: Path) -> Path:
    """Where to try things out: the run folder, or the nearest one above that is there."""
    folder = run_dir.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _space(case: Case, base: Path) -> Finding:
    """Space that is free, against the checkpoints that are kept at a time."""
    from cml_dist.memory.forecast import known_inputs, network_structure

    usage, size = shutil.disk_usage(base), 0.0
    if not usage.total:
        return Finding("space", "ok", "not told by this file system")
    if case.configuration is not None:
        with suppress(CmlError):  # check_second_derivative says why
            net = network_structure(case.config, known_inputs(case.config))
            trained = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
            size = 3 * trained / GIB  # with two moments of each; SGD has fewer
    free, kept = usage.free / GIB, case.config.checkpoint.keep_last + 2  # the best one, and the one being written
    need = f"{kept * size:.2g} GiB" if kept * size > 0.1 else f"{1024 * kept * size:.2g} MiB"
    value = f"{free:.3g} GiB free in {base}" + (f"; {kept} checkpoints take up to {need}" if size else "")
    verdict = "fault" if free <= 2 * size else "warning" if free < max(kept * size, 1.0) else "ok"
    remedy = "" if verdict == "ok" else "free some, choose another run.dir, or lower checkpoint.keep_last"
    return Finding("space", verdict, value, remedy, data={"free_gib": free, "checkpoint_gib": size})


def _write(folder: Path) -> Finding:
    """As a checkpoint is written: under another name, flushed to the disk, renamed over the one before."""
    from cml_dist.atomic import fsync

    target, temporary = folder / "file", folder / "file.writing"
    target.write_bytes(b"before")
    started_s = time.perf_counter()
    temporary.write_bytes(os.urandom(2**20))
    fsync(temporary)
    os.replace(temporary, target)
    fsync(folder)
    seconds = time.perf_counter() - started_s
    return Finding("write and rename", "ok", f"1 MiB is on the disk after {1e3 * seconds:.3g} ms", data={"s": seconds})


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
                name, found = Path(file.name).name, [_lock(file, first=True), *[SEEN] * (world.size > 1)]
        name = world.gather(name)[0]
        if not world.is_main and name is not None:
            found = list(_look_for(folder / name))
        world.gather(None)  # rank 0 keeps the file until all have looked
    return found


def _look_for(path: Path) -> Iterator[Finding]:
    """What another rank finds of the file that rank 0 has written and locked."""
    end_s = time.monotonic() + APPEAR_S
    while not path.exists() and time.monotonic() < end_s:
        time.sleep(0.1)
    if not path.exists():
        remedy = "put run.dir on a file system that all machines share, by its full path"
        yield Finding("same folder", "fault", f"{path.parent} is not the folder that rank 0 writes to", remedy)
        return
    yield SEEN
    with open(path, "r+") as file:
        yield _lock(file, first=False)


def _lock(file: IO, first: bool) -> Finding:
    """Whether the first process gets a lock, and no other."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not first:
            return Finding("locks", "warning", "flock does not keep other ranks out", NO_LOCKS)
    except BlockingIOError:
        pass
    except OSError as error:
        return Finding("locks", "warning", f"flock does not work: {error.strerror}", NO_LOCKS)
    return Finding("locks", "ok", "flock works")
