"""Every way to start: accelerate launch, torchrun, plain python and quickstart.sh bring up the same world, or say why not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import FROM_A_LAUNCHER, ROOT, finish, free_port, run, run_ranks, spawn, start, start_ranks, until

from cml_dist.run.status import read_status
from cml_dist.telemetry.metrics import read_metrics

pytestmark = pytest.mark.timeout(3600)  # whichever test comes first waits for by_accelerate
SETTINGS = (
    "domain.shots=5", "domain.queries=5", "model.hidden=[8, 8]", "method.inner_steps=2", "engine.name=graph",
    "train.steps=4", "train.episodes_per_step=3", "eval.every=0", "eval.val_episodes=4", "eval.final=false", "optim.name=sgd",
    "parallel.threads=1",
)  # fmt: skip
STRATEGIES = {"ddp": ("run.precision=fp64",), "zero2": ("parallel.strategy=zero2",)}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
TIMES = ("seconds", "episodes_per_s", "peak_memory_gib")
PROBE = """
import os
import torch.distributed as dist
from accelerate import Accelerator
import torch
accelerator = Accelerator(cpu=True)
total = torch.tensor([accelerator.process_index + 1.0])
dist.all_reduce(total)
# In one piece: print would write the end of the line by itself, and the other process in between.
os.write(1, f"world {accelerator.num_processes} total {total.item():.0f}\\n".encode())
dist.destroy_process_group()
"""


def command(folder: Path, strategy: str, *overrides: str) -> tuple[str, ...]:
    return ("-m", "cml_dist", "train", "sinusoid", f"run.dir={folder}", *SETTINGS, *STRATEGIES[strategy], *overrides)


def lines(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def by_accelerate(tmp_path_factory):
    """The metrics of a run of two processes by strategy, from the shipped launch files."""
    folder, found = tmp_path_factory.mktemp("accelerate"), {}
    for strategy, file in (("ddp", "cpu"), ("zero2", "zero2")):
        launch = ROOT / "launch" / "accelerate" / f"{file}.yaml"
        code, out = run(2, *command(folder / strategy, strategy), launch_file=launch)
        assert code == 0 and f"2 processes ({strategy})" in out, out
        found[strategy] = lines(folder / strategy)
        assert len(found[strategy]) == 4
    return found


@pytest.mark.parametrize(("rendezvous", "strategy"), [("static", "ddp"), ("c10d", "zero2")])
def test_torchrun_trains_to_the_bit_as_accelerate_launch(by_accelerate, tmp_path, rendezvous, strategy):
    how = ("--master_port", str(free_port())) if rendezvous == "static" else ("--standalone",)
    code, out = run(1, *TORCHRUN, *how, *command(tmp_path / "run", strategy))
    assert code == 0 and f"2 processes ({strategy})" in out, out
    assert lines(tmp_path / "run") == by_accelerate[strategy]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "zero2"])
def test_processes_started_by_hand_train_to_the_bit_as_accelerate_launch(by_accelerate, tmp_path, strategy):
    processes = start_ranks(2, *command(tmp_path / "run", strategy))
    said = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert f"2 processes ({strategy})" in said[0] and said[1] == "", said
    assert lines(tmp_path / "run") == by_accelerate[strategy]


def test_copies_that_know_nothing_of_each_other_are_refused(tmp_path):
    code, out = run_ranks(1, *command(tmp_path / "run", "ddp"), SLURM_STEP_NUM_TASKS="2")
    assert code == 1 and out.count("error: ") == 1 and len(out.splitlines()) == 1, out
    assert "srun started 2 copies of this command" in out and not (tmp_path / "run").exists()


def test_a_separate_run_in_each_copy_trains_alone(tmp_path):
    stray = {"PMI_SIZE": "2", "PMI_RANK": "1", "LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "2"}
    code, out = run_ranks(1, *command(tmp_path / "run", "ddp", "parallel.processes=1"), **stray)
    assert code == 0 and "1 process (single)" in out, out


def test_machines_that_were_not_started_alike_are_refused(tmp_path):
    """Each has a command line of its own: another learning rate would move its replica elsewhere, silently."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        start(1, *command(tmp_path / "run", "ddp", f"optim.lr=0.{rank}1"), **world, RANK=rank, LOCAL_RANK=rank)
        for rank in ("0", "1")
    ]
    said = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert "error: the processes were not started alike: optim.lr is 0.01 at rank 0 on" in said[0], said
    assert "but 0.11 at rank 1 on" in said[0] and not (tmp_path / "run").exists()


NOTEBOOK = """
import ctypes, os, sys
from accelerate import notebook_launcher

def fault(step, what):
    if step == 2 and os.environ["RANK"] == "1":
        if sys.argv[1] == "hangs":
            ctypes.CDLL(None).sleep(15)
        raise RuntimeError("a fault of ours")

def cell():
    from cml_dist.cli import main
    try:
        return main(sys.argv[2:], **({} if sys.argv[1] == "ends" else {"on_step": fault}))
    finally:
        print("back in the cell: rank", os.environ["RANK"], flush=True)

try:
    notebook_launcher(cell, num_processes=2, use_port=sys.argv[0].rpartition("-")[2])
    print("the cell returned")
except Exception as error:
    print("the cell raised", type(error).__name__)
"""


@pytest.mark.parametrize(
    ("how", "said", "state"),
    [("ends", "returned", "finished"), ("fails", "raised", "failed"), ("hangs", "raised", "failed")],
)
def test_a_notebooks_launcher_comes_back_whatever_becomes_of_the_run(tmp_path, how, said, state):
    cell = tmp_path / f"cell-{free_port()}"
    cell.write_text(NOTEBOOK)
    words = command(tmp_path / "run", "ddp", "parallel.hang_timeout_s=3")[2:]
    code, out = run_ranks(1, str(cell), how, *words)
    assert code == 0 and f"the cell {said}" in out, out
    if how == "hangs":  # who waited for it is not held up
        assert out.index("back in the cell: rank 0") < out.find("back in the cell: rank 1") % len(out), out
    assert read_status(tmp_path / "run" / "status.json").state == state


def test_launch_local_saves_at_ctrl_c_shows_no_traceback_and_says_how_to_go_on(tmp_path):
    """The signal comes to the command alone, which hands it on."""
    words = command(tmp_path / "run", "ddp", "train.steps=100000")[2:]
    process = spawn([sys.executable, "-m", "cml_dist", "launch", "local", "--processes=2", "--config=cpu", "--", *words])
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= 3)
    process.send_signal(signal.SIGINT)
    out = finish(process)
    assert process.returncode == 130, out
    order = ("Starting 2 processes", "Loading PyTorch", "2 processes (ddp)", "\nCtrl-C: ", "everything is saved in")
    again = "To go on: cml-dist launch local --processes=2 --config=cpu -- train "
    places = [out.index(words) for words in (*order, again)]
    assert places == sorted(places), out
    assert not any(word in out for word in ("Traceback", "torch/distributed", "\x1b", "\r")), out
    assert read_status(tmp_path / "run" / "status.json").state == "stopped"


def quickstart(*arguments: str, cwd: Path = ROOT, **environment: str) -> tuple[int, str]:
    env = {key: value for key, value in os.environ.items() if key not in FROM_A_LAUNCHER}
    env |= {"CUDA_VISIBLE_DEVICES": "", "CML_PYTHON": sys.executable, **environment}
    done = subprocess.run(
        [ROOT / "launch" / "quickstart.sh", *arguments],
        env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_quickstart_trains_from_any_folder_and_leaves_the_run_alone_behind(tmp_path):
    code, out = quickstart("sinusoid", "run.dir=run", *SETTINGS, cwd=tmp_path)
    assert code == 0 and "2 processes on the CPU (no GPU here)" in out and "2 processes (ddp)" in out, out
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and len(lines(tmp_path / "run")) == 4


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("glyfs",), {}, "error: configuration glyfs is neither a file nor a recipe; did you mean glyphs?"),
        (("train.steps=5",), {}, "error: the first argument is the recipe, not train.steps=5"),
        (("sinusoid", "train.stepz=5"), {}, "error: sinusoid: train.stepz is not a setting; did you mean train.steps?"),
        (("sinusoid",), {"CML_LAUNCH": "zero9"}, "error: launch/accelerate has no zero9.yaml"),
        (("sinusoid",), {"CML_PROCESSES": "all"}, "error: CML_PROCESSES is all, which is no number"),
        (("sinusoid",), {"CML_PYTHON": "no-such-python"}, "error: no-such-python cannot run cml_dist"),
    ],
)
def test_quickstart_says_what_is_wrong_in_one_line(arguments, environment, words):
    code, out = quickstart(*arguments, **environment)
    assert code == 2 and words in out and len(out.splitlines()) == 1, out


def test_quickstart_is_short_and_clean():
    script = ROOT / "launch" / "quickstart.sh"
    assert len(script.read_text().splitlines()) < 60
    code, out = quickstart("--help")
    assert code == 0 and out.startswith("Usage: launch/quickstart.sh RECIPE")
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout


@pytest.mark.slow  # tests that launch run beside each other anyway
def test_two_launches_at_once_are_two_worlds_of_their_own(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    runs = [start(2, str(probe)) for _ in range(2)]
    for process in runs:
        out = finish(process)
        assert process.returncode == 0, out
        assert out.splitlines() == ["world 2 total 3"] * 2, "the launcher is noisy"
