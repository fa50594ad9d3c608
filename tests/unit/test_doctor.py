"""The doctor's checks, each against the fault that it is for, and what is said of all of them together."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import json
import os
import re
import resource
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cml_dist.cli import main
from cml_dist.config.load import dump_config, load_config
from cml_dist.doctor import examine, gpus, machine, model, ring, slurm, storage, versions
from cml_dist.doctor.check import Case, Check, run_check
from cml_dist.doctor.examine import bare_config
from cml_dist.doctor.findings import Finding, listed, merge
from cml_dist.doctor.place import Place, place_of
from cml_dist.errors import WorldError
from cml_dist.parallel.srun import first_host, join_srun, tasks_of_node
from cml_dist.telemetry.console import Console

ALONE = Place(0, 1, 0, 1, "n01", "none")


def case(run_dir: Path | str = "runs/none", *overrides: str, config: str | None = None, place: Place = ALONE) -> Case:
    made = bare_config(("run.device=cpu", *overrides)) if config is None else load_config(config, overrides)
    return Case(made, config is not None, Path(run_dir), place)


def one(findings, name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == name]
    return found


# --------------------------------------------------------------------------- versions


def test_bounds_are_those_of_the_package_itself():
    declared = {line.split(">=")[0] for line in importlib.metadata.requires("cml-dist") if "extra" not in line}
    found = {finding.check: finding for finding in versions.check_versions(case())}
    assert declared <= found.keys()
    assert all(found[name].verdict == "ok" for name in declared)
    assert "pytest" not in found, "what tests alone need is not asked of a user"


@pytest.mark.parametrize(
    ("installed", "said"), [(None, "not installed"), ("1.9.1+cpu", "1.9.1+cpu, but >=2.6 is needed")]
)
def test_a_package_that_is_missing_or_too_old_is_a_fault(monkeypatch, installed, said):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name != "torch":
            return real(name)
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = one(versions.check_versions(case()), "torch")
    assert (found.verdict, found.value, found.remedy) == ("fault", said, "pip install 'torch>=2.6'")


def test_a_checkout_that_is_only_on_the_path_is_no_fault(monkeypatch):
    """It trains, see test_trainer.py; what it needs cannot be said."""

    def metadata(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", metadata)
    (found,) = versions.check_versions(case())
    assert (found.check, found.verdict) == ("cml-dist", "warning") and "pip install ." in found.remedy


def test_deepspeed_is_missed_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert one(versions.check_deepspeed(case()), "DeepSpeed").verdict == "note"
    wanted = one(versions.check_deepspeed(case("runs/none", "parallel.strategy=zero2")), "DeepSpeed")
    assert wanted.verdict == "fault" and "pip install 'cml-dist[deepspeed]'" in wanted.remedy


@pytest.mark.parametrize(
    ("ahead", "target", "verdict", "said"),
    [
        ([], ("", "0.0"), "ok", "none built ahead"),
        (["fused_adam", "cpu_adam"], ("cpu", "2.14"), "ok", "built ahead for cpu: cpu_adam, fused_adam"),
        (["cpu_adam"], ("cuda", "2.14"), "note", "DeepSpeed is on cpu here, and would compile its own"),
        (["cpu_adam"], ("cpu", "2.13"), "note", "under torch 2.13, and refused by DeepSpeed under 2.14"),
    ],
)
def test_operators_that_were_built_ahead_are_named_and_those_of_no_use_noted(ahead, target, verdict, said):
    found = versions.operators(ahead, target, ("cpu", "2.14"))
    assert (found.check, found.verdict) == ("DeepSpeed ops", verdict)
    assert found.value.startswith("a run uses none; ") and found.value.endswith(said)


def test_a_tracker_that_is_asked_for_and_missing_is_a_fault(monkeypatch):
    (check,) = [check for check in examine.CHECKS if check.name == "trackers"]
    assert run_check(check, case()) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (found,) = run_check(check, case("runs/none", "run.trackers=wandb"))
    assert found.verdict == "fault" and found.value == "run.trackers has wandb, which is not installed"


# --------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(("files", "verdict"), [(200, "fault"), (800, "warning"), (2000, "ok")])
def test_too_few_file_handles(files, verdict):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < files:
        pytest.skip(f"no process may open {files} files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    try:
        found = one(machine.check_limits(case()), "open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found.verdict == verdict and found.value.startswith(f"{files:,} ")
    assert verdict == "ok" or "ulimit -n" in found.remedy or "administrator" in found.remedy


def test_threads_of_all_processes_against_cores():
    cores = len(os.sched_getaffinity(0))
    place = Place(0, 2, 0, 2, "n01", "torchrun")
    found = one(machine.check_cores(case(place=place)), "CPU cores")
    assert found.verdict == ("ok" if cores > 1 else "warning")
    found = one(machine.check_cores(case("x", f"parallel.threads={cores + 1}")), "CPU cores")
    assert found.verdict == "warning" and found.remedy == f"set parallel.threads={cores}"


def test_memory_that_does_not_suffice(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 2**30)
    monkeypatch.setattr(machine, "limit_bytes", lambda: 2 * 2**30)
    found = one(machine.check_memory(case(place=Place(0, 4, 0, 4, "n01", "torchrun"))), "memory")
    assert found.verdict == "fault" and "control group limit 2 GiB: 4 processes need about 6 GiB" in found.value
    assert one(machine.check_memory(case()), "memory").verdict == "warning"


def test_a_gpu_that_is_asked_for_and_not_there(monkeypatch):
    monkeypatch.setattr(gpus.glob, "glob", lambda pattern: [])
    found = one(gpus.check_gpus(Case(bare_config(["run.device=cuda"]), False, Path("x"), ALONE)), "GPUs")
    assert found.verdict == "fault" and "run.device" in found.value + found.remedy


def test_gpus_against_processes_and_memory_that_others_hold(monkeypatch):
    """As torch would answer on a machine of two GPUs, the second of which somebody else uses."""
    import torch

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda number: "A100",
        "get_device_capability": lambda number: (8, 0),
        "mem_get_info": lambda number: ((39 - 20 * number) * 2**30, 40 * 2**30),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(gpus, "computes", lambda number: True)
    monkeypatch.setattr(gpus, "driver_version", lambda: "580.1")
    config = bare_config()

    def looked(check, rank: int, processes: int) -> Finding:
        place = Place(rank, processes, rank, processes, "n01", "torchrun")
        (found,) = check(Case(config, False, Path("x"), place))
        return found

    assert [looked(gpus.check_gpus, 0, processes).verdict for processes in (1, 2, 3)] == ["note", "ok", "fault"]
    assert "--num_processes 2" in looked(gpus.check_gpus, 0, 3).remedy
    free, used = looked(gpus.check_own_gpu, 0, 2), looked(gpus.check_own_gpu, 1, 2)
    assert (free.verdict, free.amount, free.value) == ("ok", 39.0, "free of 40 GiB: A100 (compute capability 8.0)")
    assert used.verdict == "warning" and "another process holds memory" in used.remedy
    monkeypatch.setattr(gpus, "computes", lambda number: False)
    assert looked(gpus.check_own_gpu, 0, 2).verdict == "fault"


@contextmanager
def mounted(folder: Path, options: str):
    """A tmpfs of its own; skips where that is not allowed."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"mounting a tmpfs needs root: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_small_shared_memory(tmp_path):
    with mounted(tmp_path / "shm", "size=64m") as folder:
        found = one(machine.check_shared_memory(case(), folder), "shared memory")
    assert found.verdict == "warning" and "--shm-size" in found.remedy
    missing = one(machine.check_shared_memory(case(), tmp_path / "none"), "shared memory")
    assert missing.verdict == "fault"


# --------------------------------------------------------------------------- storage


def test_a_good_run_folder_is_tried_and_left_as_it_was(tmp_path):
    run_dir = tmp_path / "runs" / "new"
    found = list(storage.check_run_folder(case(run_dir, config="sinusoid")))
    assert {f.check: f.verdict for f in found} == {
        name: "ok" for name in ("run folder", "space", "rename over a file", "fsync", "locks", "file times")
    }
    assert "4 checkpoints of " in one(found, "space").value
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_run_of_another_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(load_config("sinusoid", ["train.steps=7"])))
    resumed = case(tmp_path, "train.steps=7", config="sinusoid")
    other = case(tmp_path, "optim.lr=0.5", config="sinusoid")
    assert "which this configuration resumes" in one(storage.check_run_folder(resumed), "run folder").value
    found = one(storage.check_run_folder(other), "run folder")
    assert found.verdict == "fault" and "optim.lr was 0.001, is 0.5" in found.value


def test_a_folder_that_cannot_be_written(tmp_path):
    with mounted(tmp_path / "mount", "ro,size=1m") as folder:
        (found,) = storage.check_run_folder(case(folder / "run"))
    assert found.verdict == "fault" and "cannot be written: Read-only file system" in found.value


def test_a_full_file_system(tmp_path):
    with mounted(tmp_path / "mount", "size=256k") as folder:
        (folder / "filler").write_bytes(b"x" * 252 * 1024)
        found = list(storage.check_run_folder(case(folder / "run", config="glyphs")))
    assert one(found, "space").verdict == "fault"
    assert any(f.check == "run folder" and "No space left on device" in f.value for f in found)


def test_a_rename_that_is_not_atomic(tmp_path, monkeypatch):
    def replace(target: Path, data: bytes) -> None:
        target.unlink(missing_ok=True)
        time.sleep(1e-3)
        target.write_bytes(data)

    monkeypatch.setattr(storage, "_replace", replace)
    found = one(storage.check_run_folder(case(tmp_path)), "rename over a file")
    assert found.verdict == "warning" and " times missing" in found.value


def test_a_sync_that_is_refused(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        if path.is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(storage, "fsync", refuse)
    found = one(storage.check_run_folder(case(tmp_path)), "fsync")
    assert found.verdict == "warning" and found.value == "of a folder does not work: Invalid argument"


def test_locks_that_hold_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.fcntl, "flock", lambda file, how: None)
    found = one(storage.check_run_folder(case(tmp_path)), "locks")
    assert found.verdict == "warning" and "finds it free while it is held" in found.value


def test_a_temporary_folder_too_deep_for_sockets(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(storage.tempfile, "tempdir", str(deep))
    found = one(storage.check_temporary_folder(case()), "temporary folder")
    assert found.verdict == "fault" and found.remedy == "set TMPDIR to a shorter path"


# --------------------------------------------------------------------------- model and data


def test_a_backbone_that_cannot_be_differentiated_twice(monkeypatch):
    import torch

    from cml_dist.nets.conv4 import Conv4

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            ctx.save_for_backward(value)
            return value.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    forward = Conv4.forward
    check = Check("model", "second derivative", model.check_backbone)
    looked = case("x", "model.filters=4", config="glyphs")
    (fine,) = run_check(check, looked)
    assert fine.verdict == "ok" and fine.value.startswith("right for conv4, ")

    def broken(self, inputs):
        made = forward(self, inputs)
        return type(made)(made.tap, Once.apply(made.pooled))

    monkeypatch.setattr(Conv4, "forward", broken)
    (found,) = run_check(check, looked)
    assert found.verdict == "fault" and "second derivative of conv4 is wrong" in found.value, found
    assert "choose another model.backbone, or set method.order=1" in found.remedy
    (first_order,) = run_check(check, case("x", "method.order=1", config="glyphs"))
    assert first_order.verdict == "ok" and "not needed" in first_order.value


def test_data_that_is_not_there(tmp_path):
    check = Check("data", "data", model.check_data)
    (found,) = run_check(check, case("x", f"domain.root={tmp_path / 'none'}", config="mini_imagenet"))
    assert found.verdict == "fault" and "there is no packed image set at" in found.value


# --------------------------------------------------------------------------- no check hides another


def test_a_check_that_raises_and_one_that_hangs_hide_nothing():
    release = threading.Event()

    def broken(_):
        yield Finding("first", "ok", "before")
        raise ZeroDivisionError("oh")

    def hanging(_):
        release.wait()
        yield Finding("never", "ok", "")

    looked = case()
    try:
        before, broke = run_check(Check("machine", "broken", broken), looked)
        (hung,) = run_check(Check("machine", "slow disk", hanging, limit_s=0.3), looked)
    finally:
        release.set()
    assert before.value == "before" and broke.verdict == "fault" and "ZeroDivisionError: oh" in broke.value
    assert hung.verdict == "fault" and hung.check == "slow disk" and "did not end within 0 s" in hung.value
    assert "(it stands in wait, threading.py line" in hung.value
    assert looked.hung == ["slow disk"]


# --------------------------------------------------------------------------- several processes


PLACES = {rank: Place(rank, 4, rank % 2, 2, f"n0{1 + rank // 2}", "torchrun") for rank in range(4)}


def test_identical_findings_are_one_row_and_deviating_ranks_are_named():
    def of(rank: int) -> list[Finding]:
        version = "2.13.0" if rank == 3 else "2.14.1"
        return [
            Finding("torch", "ok", version, beside="(needs >=2.6)", alike="install the same"),
            Finding("memory", "ok", "free", amount=20.0 + rank, unit="GiB"),
            Finding("disk", *(("fault", "full", "free some") if rank > 1 else ("ok", "fine"))),
        ]

    rows = merge({rank: of(rank) for rank in range(4)}, PLACES)
    shown = [(row.check, row.verdict, row.who, row.value, row.remedy) for row in rows]
    assert shown == [
        ("torch", "ok", "", "2.14.1 (needs >=2.6)", ""),
        ("torch", "warning", "rank 3 on n02", "2.13.0 instead of 2.14.1", "install the same"),
        ("memory", "ok", "", "20.0 to 23.0 GiB free", ""),
        ("disk", "ok", "", "fine", ""),
        ("disk", "fault", "ranks 2 and 3 on n02", "full", "free some"),
    ]


def test_ranks_in_words():
    assert listed([5]) == "5" and listed([2, 3]) == "2 and 3" and listed([7, 0, 1, 2]) == "0 to 2 and 7"
    assert listed([1, 3, 5]) == "1, 3, 5"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_every_pair_of_the_ring_is_played_and_no_rank_plays_twice_at_once(size):
    rounds = ring.neighbours(size)
    pairs = {frozenset(pair) for each in rounds for pair in each}
    assert pairs == ({frozenset((rank, (rank + 1) % size)) for rank in range(size)} if size > 1 else set())
    for each in rounds:
        ranks = [rank for pair in each for rank in pair]
        assert len(ranks) == len(set(ranks))


def test_the_slowest_pair_is_named_and_a_wrong_sum_is_a_fault():
    speeds = {(0, 1): 4000.0, (1, 2): 900.0, (2, 3): 4000.0, (3, 0): 90.0}
    pairs = [ring.Pair(*pair, ms=0.1, mb_per_s=speed) for pair, speed in speeds.items()]
    inside, between, reduced = ring.ring_findings(pairs, ring.Reduced(2**26, 0.5, False), "gloo", PLACES, None)
    assert inside.verdict == "ok" and inside.value.startswith("4,000 MB/s, latency 0.1 ms")
    assert between.verdict == "warning" and "slowest: rank 3 on n02, rank 0 on n01" in between.value
    assert "GLOO_SOCKET_IFNAME" in between.remedy
    assert reduced.verdict == "fault" and "WRONG sum" in reduced.value


# --------------------------------------------------------------------------- SLURM


def test_tasks_of_srun_are_told_who_they_are(monkeypatch):
    task = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": "a,b,c",
    }  # fmt: skip
    told = join_srun(task)
    assert (told["RANK"], told["WORLD_SIZE"], told["LOCAL_RANK"], told["LOCAL_WORLD_SIZE"]) == ("4", "5", "0", "1")
    assert told["MASTER_ADDR"] == "a" and 20000 <= int(told["MASTER_PORT"]) < 32000
    place = place_of({**task, **told})
    assert (place.rank, place.size, place.local_size, place.launcher) == (4, 5, 1, "srun")
    with pytest.raises(WorldError, match="WORLD_SIZE is 5, but LOCAL_RANK is not set"):
        place_of({name: value for name, value in told.items() if name != "LOCAL_RANK"})
    assert join_srun({**task, "RANK": "1"}) == {}, "a launcher has said it already"
    assert join_srun({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "5"}) == {}, "a batch script is one process"
    with pytest.raises(WorldError, match="does not say enough"):
        join_srun({**task, "SLURM_STEP_TASKS_PER_NODE": "2"})
    assert [tasks_of_node("2(x2),1", node) for node in range(3)] == [2, 2, 1]
    assert first_host("login") == "login"
    lists = {"n[01-04]": "n01", "n[3,5-7],x9": "n3", "rack[1-2]n[03,05],x7": "rack1n03", "a,b[1-2]": "a"}
    assert {nodes: first_host(nodes) for nodes in lists} == lists


def test_a_job_is_read_from_what_slurm_says(tmp_path, monkeypatch):
    """scontrol as SLURM 22.05 answers."""
    fake = tmp_path / "scontrol"
    fake.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = write ]; then printf "#!/bin/bash\\n#SBATCH --signal=USR1@120\\nsrun x\\n"; exit; fi\n'
        'echo "JobId=12 JobName=x Requeue=0 Restarts=1 BatchFlag=1"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {
        "JOB_ID": "12", "JOB_NUM_NODES": "2", "JOB_NODELIST": "n[01-02]", "JOB_PARTITION": "main",
        "MEM_PER_NODE": "4096", "JOB_END_TIME": str(int(time.time()) + 7300),
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = list(slurm.check_slurm(case()))
    assert one(found, "job").verdict == "warning", "one process uses a part of two nodes"
    assert "n[01-02]), partition main, 4 GiB a node" in one(found, "job").value
    assert one(found, "time left").value.startswith("2 h ")
    assert one(found, "requeue").verdict == "note" and "--requeue" in one(found, "requeue").remedy
    assert one(found, "signal").value == "the batch script asks for USR1@120 before the end"
    assert slurm._duration("1-02:03:04") == 93784 and slurm._duration("3:04") == 184
    assert slurm._duration("UNLIMITED") is None


# --------------------------------------------------------------------------- the whole


@pytest.fixture
def quick(monkeypatch):
    """Without what takes seconds, and is tried above."""
    slow = ("DeepSpeed", "second derivative")
    monkeypatch.setattr(examine, "CHECKS", tuple(c for c in examine.CHECKS if c.name not in slow))


def test_ready_and_not_ready(quick, tmp_path, capfd):
    assert main(["doctor", "run.device=cpu", "--run-dir", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[-1].startswith("Ready")
    assert "  ok       world: one process alone, on cpu" in out and "  ok       fsync: works" in out
    (tmp_path / "file").write_text("")
    assert main(["doctor", "run.device=cpu", "parallel.processes=3", "--json", f"run.dir={tmp_path / 'file'}"]) == 1
    report = json.loads(capfd.readouterr().out)
    faults = {row["check"]: row["remedy"] for row in report["findings"] if row["verdict"] == "fault"}
    assert not report["ready"] and faults.keys() == {"world", "run folder"}, report
    assert "parallel.processes=1" in faults["world"] and faults["run folder"] == "choose another run.dir"


def test_a_terminal_of_a_hundred_columns_shows_remedies_under_their_findings():
    file = io.StringIO()
    console = Console(file, width=100, interactive=True)
    rows = merge(
        {0: [Finding("open files", "fault", "200 (ulimit -n) " + "and more " * 20, "ulimit -n 4096", group="machine")]},
        {0: ALONE},
    )
    console.findings({"machine": rows})
    console.verdict("Not ready: 1 fault", False, [("open files", "ulimit -n 4096")])
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).splitlines()
    assert max(map(len, lines)) <= 100
    at = next(n for n, line in enumerate(lines) if "-> ulimit -n 4096" in line)
    assert lines[1].startswith("  fault    open files  200") and lines[at].index("->") == lines[1].index("200")
    assert lines[-1] == "  1. open files; ulimit -n 4096"
