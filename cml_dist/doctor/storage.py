"""The run folder's file system, as checkpoints need it, and the folder for temporary files."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cml_dist.doctor.check import Case
from cml_dist.doctor.findings import Finding
from cml_dist.domains.publish import fsync
from cml_dist.errors import CmlError

GIB = 2**30
SLOW_SYNC_S = 1.0
FAR_S = 1.0
RENAMES, PIECE_BYTES = 200, 8192
FEW_GIB = 1.0
MOUNT_WITH_LOCKS = (
    "mount it with flock (Lustre: -o flock, NFS: not nolock): else a lease alone keeps a second start out"
)
SOCKET_PATH = 107
"""Longest path of a socket, of which multiprocessing needs about 32 characters below the temporary folder."""


def base_of(run_dir: Path) -> Path:
    """Where to try things out: the run folder, or where it would be made."""
    folder = run_dir.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


@contextmanager
def probe_folder(base: Path) -> Iterator[Path]:
    """A folder of our own below ``base``, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=".cml-dist-doctor-", dir=base))
    os.chmod(folder, 0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_run_folder(case: Case) -> Iterator[Finding]:
    """Whether it can be written, and has what checkpoints rest on: atomic rename, fsync, locks."""
    base = base_of(case.run_dir)
    where = (
        str(case.run_dir)
        if base == case.run_dir.expanduser().absolute()
        else f"{case.run_dir} (not there yet; tried in {base})"
    )
    if not base.is_dir():
        yield Finding("run folder", "fault", f"{base} is no folder", "choose another run.dir")
        return
    try:
        with probe_folder(base) as folder:
            yield _content(case, where, base)
            yield from _space(case, base)
            yield _rename(folder)
            yield _sync(folder)
            yield _lock(folder)
            yield _file_clock(folder)
    except OSError as error:
        remedy = "choose a run.dir that can be written, or mend its permissions or mount"
        yield Finding("run folder", "fault", f"{where} cannot be written: {error.strerror}", remedy)


def _content(case: Case, where: str, base: Path) -> Finding:
    """A folder that can be written: new, or with a run that the configuration may go on with."""
    from cml_dist.run.checkpoint import steps_in
    from cml_dist.run.folder import RunFolder

    folder, data = RunFolder(case.run_dir.expanduser()), {"path": str(base)}
    if not folder.exists:
        return Finding("run folder", "ok", f"{where} can be written", data=data)
    steps = steps_in(folder.checkpoints)
    value = f"{where} can be written, and holds a run" + (f" with a checkpoint of step {steps[-1]}" if steps else "")
    if case.configured:
        try:
            folder.check_resumable(case.config)
        except CmlError as error:
            return Finding("run folder", "fault", error.what, error.remedy, data=data)
        value += ", which this configuration resumes"
    return Finding("run folder", "ok", value, data=data)


def _space(case: Case, base: Path) -> Iterator[Finding]:
    state = os.statvfs(base)
    if not state.f_blocks:
        return  # a file system that does not count
    free = state.f_frsize * state.f_bavail / GIB
    size, kept = checkpoint_bytes(case), case.config.checkpoint.keep_last + 2  # the best one, and the one being written
    value, verdict, remedy = "in the run folder", "ok", ""
    if size is not None:
        value += f", {kept} checkpoints of {_size(size)} at a time"
    if state.f_files and not state.f_favail:
        value, verdict, remedy = f"{value}, but no inodes: no file more can be made", "fault", "remove files there"
    elif size is not None and free * GIB < 2 * size:
        verdict, remedy = "fault", "free some, or choose another run.dir"
    elif size is not None and free * GIB < kept * size:
        verdict, remedy = "warning", "free some, or lower checkpoint.keep_last"
    elif free < FEW_GIB:
        verdict, remedy = "warning", "free some, or choose another run.dir"
    data = {"free_gib": free, "checkpoint_gib": None if size is None else size / GIB}
    yield Finding("space", verdict, value, remedy, free, "GiB free", data=data)


def checkpoint_bytes(case: Case) -> int | None:
    """Bytes of one checkpoint: parameters and moments; None where they are not known."""
    optim, parameters = case.config.optim, parameter_bytes(case)
    moments = (1 if optim.momentum else 0) if optim.name == "sgd" else 2
    return None if parameters is None else parameters * (1 + moments)


def parameter_bytes(case: Case) -> int | None:
    """Bytes of what is meta-trained; None without a configuration, or where shapes are not known."""
    if not case.configured:
        return None
    from cml_dist.planning.forecast import known_inputs, network_structure

    try:
        net = network_structure(case.config, known_inputs(case.config))
    except CmlError:
        return None  # the check of the model says why
    return sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)


def _size(size: int) -> str:
    return f"{size / GIB:.3g} GiB" if size > GIB / 10 else f"{size / 2**20:.3g} MiB"


def _rename(folder: Path) -> Finding:
    """Replace a file again and again, while another thread reads: it must always find one of the two, whole."""
    pieces = (b"a" * PIECE_BYTES, b"b" * PIECE_BYTES)
    target, over = folder / "renamed", threading.Event()
    _replace(target, pieces[0])
    seen = {"whole": 0, "missing": 0, "mixed": 0}

    def read() -> None:
        while not over.is_set():
            seen[look(target)] += 1

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for number in range(RENAMES):
            _replace(target, pieces[number % 2])
    finally:
        over.set()
        reader.join(10)
    return rename_finding("rename over a file", seen)


def look(path: Path) -> str:
    """``whole``, ``missing`` or ``mixed``: what a reader finds of a file of equal bytes that is being replaced."""
    try:
        data = path.read_bytes()
    except OSError:  # not there, or (NFS) its handle went stale
        return "missing"
    return "whole" if len(data) == PIECE_BYTES and len(set(data)) == 1 else "mixed"


def rename_finding(name: str, seen: dict[str, int]) -> Finding:
    total = sum(seen.values())
    bad = ", ".join(f"{seen[kind]} times {kind}" for kind in ("missing", "mixed") if seen[kind])
    if bad:
        remedy = "choose a local or POSIX file system: a checkpoint may be lost when a job is killed"
        return Finding(name, "warning", f"not atomic: {bad} in {total:,} looks", remedy, data=dict(seen))
    return Finding(name, "ok", f"atomic in {total:,} looks", data=dict(seen))


def _replace(target: Path, data: bytes) -> None:
    temporary = target.with_name(f".{target.name}.writing")
    temporary.write_bytes(data)
    os.replace(temporary, target)


def replace_for(folder: Path, seconds: float) -> None:
    """Replace ``renamed`` in a folder for a while, for readers in other processes."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        _replace(folder / "renamed", (b"a", b"b")[number % 2] * PIECE_BYTES)
        number += 1


def _sync(folder: Path) -> Finding:
    """fsync of a file and of its folder: what makes a checkpoint survive a power cut."""
    file = folder / "synced"
    file.write_bytes(b"x" * 2**20)
    times = {}
    for what, path in (("file", file), ("folder", folder)):
        started = time.perf_counter()
        try:
            fsync(path)
        except OSError as error:
            remedy = "choose another file system for run.dir: a checkpoint may not survive a crash of the machine"
            return Finding("fsync", "warning", f"of a {what} does not work: {error.strerror}", remedy)
        times[what] = time.perf_counter() - started
    value = f"works: 1 MiB in {1e3 * times['file']:.3g} ms, its folder in {1e3 * times['folder']:.3g} ms"
    if max(times.values()) > SLOW_SYNC_S:
        return Finding("fsync", "note", f"{value}: slow", "keep checkpoints apart: checkpoint.every", data=times)
    return Finding("fsync", "ok", value, data=times)


_TRY_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "a")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("held")
else:
    print("free")
"""


def _lock(folder: Path) -> Finding:
    """flock between two processes of this machine: keeps a second trainer out of a run folder."""
    path = folder / "lock"
    remedy = f"{MOUNT_WITH_LOCKS}, or choose another file system for run.dir"
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            while_held = _other_process(path)
        after = _other_process(path)
    except OSError as error:
        return Finding("locks", "warning", f"flock does not work: {error.strerror}", remedy)
    if (while_held, after) != ("held", "free"):
        value = f"a second process finds it {while_held} while it is held, {after} afterwards"
        return Finding("locks", "warning", value, remedy)
    return Finding("locks", "ok", "flock keeps a second process out")


def _other_process(path: Path) -> str:
    run = subprocess.run([sys.executable, "-I", "-c", _TRY_LOCK, str(path)], capture_output=True, text=True, timeout=30)
    return run.stdout.strip() or (run.stderr.strip().splitlines() or ["silent"])[-1]


def _file_clock(folder: Path) -> Finding:
    """The time that the file system writes, against this machine's."""
    before = time.time()
    (folder / "dated").write_bytes(b"x")
    written, after = (folder / "dated").stat().st_mtime, time.time()
    off = max(before - written, written - after, 0.0)
    if off > FAR_S:
        way = "behind" if written < before else "ahead"
        return Finding(
            "file times",
            "warning",
            f"{off:.3g} s {way} of this machine's clock",
            "set both by NTP",
            data={"off_s": off},
        )
    return Finding(
        "file times",
        "ok",
        f"within {max(1e3 * off, 1):.0f} ms of this machine's clock",
        brief=True,
        data={"off_s": off},
    )


def check_temporary_folder(case: Case) -> Iterator[Finding]:
    """Where loader processes and libraries put temporary files."""
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        yield Finding("temporary folder", "fault", str(error), "set TMPDIR to a folder that can be written")
        return
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"x" * 2**20)
            file.flush()
    except OSError as error:
        value = f"{folder} cannot be written: {error.strerror}"
        yield Finding("temporary folder", "fault", value, "free space there, or set TMPDIR to another folder")
        return
    state = os.statvfs(folder)
    free, value = state.f_frsize * state.f_bavail / GIB, f"free in {folder}"
    if len(folder) + 32 > SOCKET_PATH:
        remedy = "set TMPDIR to a shorter path"
        yield Finding(
            "temporary folder", "fault", f"{value}: too long for sockets of loader processes", remedy, free, "GiB"
        )
    elif free < FEW_GIB:
        remedy = "free space there, or set TMPDIR to another folder"
        yield Finding("temporary folder", "warning", value, remedy, free, "GiB")
    else:
        yield Finding("temporary folder", "ok", value, "", free, "GiB")


def try_lock(path: Path) -> str:
    """``held``, ``free``, or the error: what a process finds of a lock that another one holds."""
    with suppress(FileNotFoundError), open(path, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        except OSError as error:
            return str(error.strerror)
        return "free"
    return "missing"
