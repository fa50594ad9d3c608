"""Whole runs on a GPU, as users start them: the CPU's curve, exact resume, another device, and what is said."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, finish, run, spawn, start
from test_train import until
from test_world_change import assert_close, curve, largest_difference, newest

import cml_dist

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

SETTINGS = (
    "domain.queries=5", "model.filters=16", "train.steps=12", "train.episodes_per_step=3", "eval.every=6",
    "eval.val_episodes=10", "eval.episodes=10", "checkpoint.every=3", "run.log_every=5", "parallel.threads=1",
)  # fmt: skip
HERE = {"CUDA_VISIBLE_DEVICES": "0"}
LAUNCH = ROOT / "launch" / "accelerate"


def command(folder: Path, *overrides: str) -> tuple[str, ...]:
    return ("-m", "cml_dist", "train", "glyphs", f"run.dir={folder}", *SETTINGS, *overrides)


def launched(strategy: str, *arguments: str) -> tuple[int, str]:
    """By accelerate launch, one process on the first GPU."""
    words = ("-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / f"{strategy}.yaml"))
    return run(1, *words, "--num_processes", "1", *arguments, **HERE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run on the GPU, and what it printed."""
    folder = tmp_path_factory.mktemp("gpu") / "run"
    code, out = run(1, *command(folder), **HERE)
    assert code == 0, out
    return folder, out


def test_what_is_said(undisturbed):
    folder, out = undisturbed
    assert torch.cuda.get_device_name(0) in out
    assert "Warning" not in out and "warning" not in out, out
    (session,) = map(json.loads, (folder / "sessions.jsonl").read_text().splitlines())
    assert session["plan"]["memory"], "the GPU's memory is a budget"


def test_a_profile_has_kernels_and_a_snapshot_of_the_memory(undisturbed, tmp_path):
    code, out = run(1, *command(tmp_path, "run.profile=2:3", "eval.final=false"), **HERE)
    assert code == 0 and "ms on the GPU" in out and "warning" not in out, out
    with gzip.open(tmp_path / "profile" / "steps_2-3.rank0.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert {event.get("cat") for event in events} >= {"kernel", "cpu_op"}
    assert {event["name"] for event in events if event["ph"] == "C"} >= {"memory of GPU 0"}
    assert (tmp_path / "profile" / "steps_2-3.rank0.memory.pickle").stat().st_size > 1000
    assert [line["loss"] for line in curve(tmp_path)] == [line["loss"] for line in curve(undisturbed[0])]


def test_float64_is_the_curve_of_the_cpu(tmp_path):
    for device in ("cpu", "cuda"):
        words = command(tmp_path / device, "run.precision=fp64", f"run.device={device}", "model.filters=8")
        code, out = run(1, *words, **HERE)
        assert code == 0, out
    assert_close(curve(tmp_path / "cuda"), curve(tmp_path / "cpu"), 1e-8)
    assert largest_difference(newest(tmp_path / "cuda"), newest(tmp_path / "cpu")) < 1e-8
    tests = [json.loads((tmp_path / device / "eval.json").read_text()) for device in ("cpu", "cuda")]
    assert tests[0]["meta"]["mean"] == tests[1]["meta"]["mean"]


def test_a_run_that_is_stopped_and_killed_gives_the_same_bits(undisturbed, tmp_path):
    folder = tmp_path / "run"
    for number in (signal.SIGUSR1, signal.SIGKILL):
        process = start(1, *command(folder, "checkpoint.every=1"), **HERE)
        steps = (folder / "metrics.jsonl").read_bytes().count(b"\n") if folder.exists() else 0
        until(lambda steps=steps: (folder / "metrics.jsonl").is_file() and len(curve(folder)) > steps + 1)
        os.kill(process.pid, number)
        out = finish(process)
        assert process.returncode == (75 if number == signal.SIGUSR1 else -signal.SIGKILL), out
    assert 2 < len(curve(folder)) < 12
    code, out = run(1, *command(folder, "checkpoint.every=1"), **HERE)
    assert code == 0, out
    assert curve(folder) == curve(undisturbed[0])
    assert curve(folder, "validation.jsonl") == curve(undisturbed[0], "validation.jsonl")
    there, expected = newest(folder), newest(undisturbed[0])
    assert all(torch.equal(there[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("file", "strategy"), [("ddp", "single"), ("zero2-offload", "zero2"), ("zero3-offload", "zero3")]
)
def test_a_launched_strategy_is_the_plain_run_and_goes_on_on_the_cpu(tmp_path, file, strategy):
    """SGD, which leaves rounding as small as it is; few and small steps, since ReLUs switch by rounding."""
    sgd = ("optim.name=sgd", "optim.lr=0.001", "eval.every=0", "eval.final=false")
    plain, folder = tmp_path / "plain", tmp_path / "launched"
    code, out = run(1, *command(plain, *sgd, "train.steps=4"), **HERE)
    assert code == 0, out
    code, out = launched(file, *command(folder, *sgd, "train.steps=4"))
    assert code == 0 and "Warning" not in out, out
    (session,) = map(json.loads, (folder / "sessions.jsonl").read_text().splitlines())
    assert session["plan"]["strategy"] == strategy and session["hardware"] == torch.cuda.get_device_name(0)
    assert_close(curve(folder), curve(plain), 1e-4)
    assert largest_difference(newest(folder), newest(plain)) < 1e-6
    code, out = run(1, *command(folder, *sgd, "train.steps=5", "parallel.strategy=auto"))
    assert code == 0 and "Resuming at step 4" in out, out
    assert len(curve(folder)) == 5


def test_an_exported_learner_predicts_alike_on_both_devices(undisturbed):
    images = torch.rand(10, 1, 28, 28, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    labels = [number % 5 for number in range(10)]
    found = []
    for device in ("cpu", "cuda"):
        learner = cml_dist.load(undisturbed[0], device).adapt(images, labels)
        found.append(torch.as_tensor(learner.probabilities(images)).cpu())
    assert (found[0] - found[1]).abs().max() < 1e-3


def test_memory_that_runs_out_is_one_line(tmp_path):
    few = "import torch; torch.cuda.set_per_process_memory_fraction(1e-4); from cml_dist.cli import main; "
    words = command(tmp_path / "run", "model.filters=128", "domain.queries=15")[2:]
    code, out = run(1, "-c", f"{few}raise SystemExit(main({list(words)!r}))", **HERE)
    assert code == 1 and "Traceback" not in out, out
    size = r"[0-9.]+ [KMG]iB"
    line = rf"^error: the GPU's memory ran out \(cuda.*\): {size} were asked for, {size} of {size} were free; see"
    assert re.search(line, out, re.M), out


def test_quickstart_takes_the_gpu(tmp_path):
    words = ["launch/quickstart.sh", "sinusoid", f"run.dir={tmp_path / 'run'}", "train.steps=5", "eval.final=false"]
    process = spawn(["bash", *words], **HERE, CML_PYTHON=sys.executable)
    out = finish(process)
    assert process.returncode == 0, out
    assert "sinusoid: 1 process on a GPU" in out and torch.cuda.get_device_name(0) in out


@pytest.mark.parametrize("processes", sorted({1, torch.cuda.device_count()}))
def test_the_doctor_finds_the_gpus_ready(tmp_path, processes):
    words = ("-m", "cml_dist", "doctor", "glyphs", "--run-dir", str(tmp_path / "run"), "--json")
    seen = ",".join(map(str, range(processes)))
    if processes > 1:
        code, out = run(processes, *words, launch_file=LAUNCH / "ddp.yaml", CUDA_VISIBLE_DEVICES=seen)
    else:
        code, out = run(1, *words, **HERE)
    assert code == 0, out
    found = json.dumps(json.loads(out[out.index("{") :]))
    assert torch.cuda.get_device_name(0) in found and ("NCCL" in found) == (processes > 1), found
