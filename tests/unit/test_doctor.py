"""The doctor's checks, each against the fault that it is for, and what is said of all of them together."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cml_dist.cli import main
from cml_dist.config.load import dump_config, load_config
from cml_dist.distributed.env import Launched, first_host, join_srun, launched, tasks_of_node
from cml_dist.errors import WorldError
from cml_dist.tools.doctor import checks, examine
from cml_dist.tools.doctor.checks import Case, Finding
from cml_dist.tools.doctor.examine import look, merge

ON_CPU = ("run.device=cpu",)


def case(
    run_dir: Path | str = "runs/none", *overrides: str, config: str | None = None, here: Launched | None = None
) -> Case:
    made = load_config(config or "glyphs", overrides or ON_CPU)
    return Case(made, config, Path(run_dir), here or Launched())


def one(findings, name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == name]
    return found


# --------------------------------------------------------------------------- what is installed


def test_bounds_are_those_of_the_package_itself():
    declared = {line.split(">=")[0] for line in importlib.metadata.requires("cml-dist") if "extra" not in line}
    found = {finding.check: finding for finding in checks.check_versions(case())}
    assert declared <= found.keys()
    assert all(found[name].verdict == "ok" for name in declared)
    assert "pytest" not in found, "what tests alone need is not asked of a user"


@pytest.mark.parametrize(
    ("version", "said"), [(None, "not installed"), ("1.9.1+cpu", "1.9.1+cpu, but >=2.6 is needed")]
)
def test_a_package_that_is_missing_or_too_old_is_a_fault(monkeypatch, version, said):
    real = importlib.metadata.version

    def answer(name: str) -> str:
        if name != "torch":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", answer)
    found = one(checks.check_versions(case()), "torch")
    assert (found.verdict, found.value, found.remedy) == ("fault", said, "pip install 'torch>=2.6'")


def test_a_checkout_that_is_only_on_the_path_is_no_fault(monkeypatch):
    """It trains, see test_trainer.py; what it needs cannot be said."""

    def metadata(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", metadata)
    (found,) = checks.check_versions(case())
    assert (found.check, found.verdict) == ("cml-dist", "warning") and "pip install ." in found.remedy


# --------------------------------------------------------------------------- the machine


def test_gpus_against_processes_and_memory_that_others_hold(monkeypatch):
    """As torch would answer on a machine of two GPUs, the second of which somebody else uses."""
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda number: "A100",
        "get_device_capability": lambda number: (8, 0),
        "mem_get_info": lambda number: ((39 - 20 * number) * 2**30, 40 * 2**30),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)

    def looked(rank: int, processes: int) -> Finding:
        (found,) = checks.check_gpu(case("x", "run.device=auto", here=Launched(rank, processes, rank, processes)))
        return found

    assert looked(0, 1).verdict == "note" and looked(0, 1).remedy.endswith("to use all: --num_processes 2")
    assert looked(0, 2).verdict == "ok" and looked(0, 2).value.startswith("A100, 40 GiB (compute capability 8.0")
    assert looked(1, 2).verdict == "warning" and looked(1, 2).value.endswith("19 GiB are free")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks.os.path, "exists", lambda path: path == "/dev/nvidia0")
    assert looked(0, 1).verdict == "warning" and "see nvidia-smi" in looked(0, 1).remedy


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


def test_a_small_shared_memory(tmp_path, monkeypatch):
    with mounted(tmp_path / "shm", "size=64m") as folder:
        monkeypatch.setattr(checks, "SHARED", str(folder))
        found = one(checks.check_shared_memory(case()), "shared memory")
    assert found.verdict == "warning" and "--shm-size" in found.remedy


def test_a_job_is_read_from_what_slurm_says(monkeypatch):
    end = str(int(time.time()) + 7300)
    for name, value in {"ID": "12", "NUM_NODES": "2", "NODELIST": "n[01-02]", "END_TIME": end}.items():
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    (job,) = checks.check_slurm(case())
    assert job.verdict == "warning" and re.match(r"12 on n\[01-02\], 2 h 1 min left; the job has 2 nodes", job.value)


def test_tasks_of_srun_are_told_who_they_are():
    task = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": "a,b,c",
    }  # fmt: skip
    told = join_srun(task)
    assert (told["RANK"], told["WORLD_SIZE"], told["LOCAL_RANK"], told["LOCAL_WORLD_SIZE"]) == ("4", "5", "0", "1")
    assert told["MASTER_ADDR"] == "a" and 20000 <= int(told["MASTER_PORT"]) < 32000
    here = launched({**task, **told})
    assert (here.rank, here.size, here.local_size) == (4, 5, 1)
    with pytest.raises(WorldError, match="WORLD_SIZE is 5, but LOCAL_RANK is not set"):
        launched({name: value for name, value in told.items() if name != "LOCAL_RANK"})
    assert join_srun({**task, "RANK": "1"}) == {}, "a launcher has said it already"
    assert join_srun({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "5"}) == {}, "a batch script is one process"
    with pytest.raises(WorldError, match="does not say enough"):
        join_srun({**task, "SLURM_STEP_TASKS_PER_NODE": "2"})
    assert [tasks_of_node("2(x2),1", node) for node in range(3)] == [2, 2, 1]
    assert first_host("login") == "login"
    lists = {"n[01-04]": "n01", "n[3,5-7],x9": "n3", "rack[1-2]n[03,05],x7": "rack1n03", "a,b[1-2]": "a"}
    assert {nodes: first_host(nodes) for nodes in lists} == lists


# --------------------------------------------------------------------------- the run folder


class Alone:
    """As a world of one process answers."""

    is_main, size = True, 1

    def gather(self, value):
        return [value]


def shared(run_dir: Path) -> dict[str, Finding]:
    looked = case(run_dir)
    looked.world = Alone()
    return {finding.check: finding for finding in checks.share_run_folder(looked)}


def test_a_good_run_folder_is_tried_and_left_as_it_was(tmp_path):
    found = shared(tmp_path / "runs" / "new")
    assert {f.check: f.verdict for f in found.values()} == dict.fromkeys(
        ("write and rename", "same folder", "locks"), "ok"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_run_of_another_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(load_config("sinusoid", ["train.steps=7"])))
    only = {"run folder": checks.check_run_folder}
    (found,) = look(only, case(tmp_path, "train.steps=7", config="sinusoid"))
    assert found.value.endswith("holds a run, which this configuration resumes")
    (found,) = look(only, case(tmp_path, "optim.lr=0.5", config="sinusoid"))
    assert found.verdict == "fault" and "optim.lr was 0.001, is 0.5" in found.value


def test_a_folder_that_cannot_be_written(tmp_path):
    with mounted(tmp_path / "mount", "ro,size=1m") as folder:
        (found,) = shared(folder / "run").values()
    assert found.verdict == "fault" and found.value.endswith("cannot be written: Read-only file system")


def test_a_full_file_system(tmp_path):
    with mounted(tmp_path / "mount", "size=256k") as folder:
        (folder / "filler").write_bytes(b"x" * 252 * 1024)
        (found,) = shared(folder / "run").values()
    assert found.verdict == "fault" and "No space left on device" in found.value


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checks.fcntl, "flock", refuse)
    found = shared(tmp_path)["locks"]
    assert found.verdict == "warning" and found.value == "flock does not work: No locks available"
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- network and data


def test_a_backbone_that_cannot_be_differentiated_twice(monkeypatch):
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
    only = {"second derivative": checks.check_second_derivative}
    looked = case("x", "model.filters=4", config="glyphs")
    (fine,) = look(only, looked)
    assert fine.verdict == "ok" and fine.value.startswith("right for conv4, "), fine

    def broken(self, inputs):
        made = forward(self, inputs)
        return type(made)(made.tap, Once.apply(made.pooled))

    monkeypatch.setattr(Conv4, "forward", broken)
    (found,) = look(only, looked)
    assert found.verdict == "fault" and found.value.startswith("the second derivative of conv4 is wrong"), found
    assert "choose another model.backbone, or set method.order=1" in found.remedy
    (first_order,) = look(only, case("x", "method.order=1", config="glyphs"))
    assert first_order.verdict == "ok" and "not needed" in first_order.value


def test_data_that_is_not_there(tmp_path):
    (found,) = look({"data": checks.check_data}, case("x", f"domain.root={tmp_path / 'none'}", config="mini_imagenet"))
    assert found.verdict == "fault" and "packed image set at" in found.value


# --------------------------------------------------------------------------- all of them


def test_a_check_that_raises_hides_nothing():
    def broken(_):
        yield Finding("first", "ok", "before")
        raise ZeroDivisionError("oh")

    def fine(_):
        yield Finding("second", "ok", "after")

    before, broke, after = look({"broken": broken, "fine": fine}, case())
    assert (before.value, after.value) == ("before", "after")
    assert broke.verdict == "fault" and broke.value.startswith("ZeroDivisionError: oh (test_doctor.py:")


def test_identical_findings_are_one_row_and_deviating_ranks_are_named():
    def of(rank: int) -> list[Finding]:
        version = "2.13.0" if rank == 3 else "2.14.1"
        return [
            Finding("torch", "ok", version, alike="install the same"),
            Finding("job", "ok", "7 on n[1-2]"),
            Finding("disk", *(("fault", "full", "free some") if rank > 1 else ("ok", "fine"))),
        ]

    rows = merge([(f"n0{1 + rank // 2}", of(rank)) for rank in range(4)])
    shown = [(row.check, row.verdict, row.who, row.value, row.remedy) for row in rows]
    assert shown == [
        ("torch", "ok", "ranks 0, 1, 2 on n01 (2), n02 (1)", "2.14.1", ""),
        ("torch", "warning", "rank 3 on n02", "2.13.0 instead of 2.14.1", "install the same"),
        ("job", "ok", "", "7 on n[1-2]", ""),
        ("disk", "ok", "ranks 0, 1 on n01", "fine", ""),
        ("disk", "fault", "ranks 2, 3 on n02", "full", "free some"),
    ]


@pytest.fixture
def quick(monkeypatch):
    """Without what takes seconds, and is tried above."""
    quick = {name: check for name, check in examine.IN_THE_WORLD.items() if name != "second derivative"}
    monkeypatch.setattr(examine, "IN_THE_WORLD", quick)


def test_ready_and_not_ready(quick, tmp_path, capfd):
    assert main(["doctor", "run.device=cpu", "--run-dir", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[-1].startswith("Ready")
    assert "  ok       world: one process alone, on cpu" in out and "  ok       locks: flock works" in out
    (tmp_path / "file").write_text("")
    assert main(["doctor", "run.device=cpu", "--json", f"run.dir={tmp_path / 'file'}"]) == 1
    report = json.loads(capfd.readouterr().out)
    faults = {row["check"]: row["remedy"] for row in report["findings"] if row["verdict"] == "fault"}
    assert not report["ready"] and faults.keys() == {"write and rename"}, report
    assert main(["doctor", "run.device=cpu", f"run.dir={tmp_path / 'file'}"]) == 1
    *_, said, repair = capfd.readouterr().out.splitlines()
    assert said.startswith("Not ready: 1 fault")
    what = f"  1. write and rename: {tmp_path / 'file'} cannot be written: Not a directory; choose a run.dir"
    assert repair.startswith(what)


def test_a_world_that_cannot_be_joined_is_reported_with_what_was_found_before(tmp_path, capfd):
    assert main(["doctor", "run.device=cpu", "parallel.processes=3", "--json", f"run.dir={tmp_path}"]) == 1
    report = json.loads(capfd.readouterr().out)
    assert one_row(report, "torch")["verdict"] == "ok"
    fault = one_row(report, "world")
    assert fault["verdict"] == "fault" and "parallel.processes=1" in fault["remedy"]


def one_row(report: dict, check: str) -> dict:
    (row,) = (row for row in report["findings"] if row["check"] == check)
    return row
