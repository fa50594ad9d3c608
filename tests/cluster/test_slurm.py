"""The batch scripts on a real SLURM of four nodes: started, stopped, requeued, broken, and the curve is the same.

All jobs are in the queue at once, and each test waits for its own. How long a meta-step takes here, nobody knows: the
runs that are to be disturbed have no end, and are cancelled once they have shown what they should.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from slurm_lab import FAST, ROOT, Cluster, Job

from cml_dist.launching.batch_script import fill_in

TWO_NODES = ("--nodes=2", "--processes-per-node=1")
ENDLESS = ("train.steps=100000", "train.episodes_per_step=40", "run.dtype=float64", "checkpoint.every=7")
MORE = 5
"""Meta-steps after a resume that are compared."""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, tmp_path_factory) -> dict[str, Job]:
    """Everything that runs side by side; what is to be disturbed as soon as it trains has been."""
    root = tmp_path_factory.mktemp("slurm")

    def launch(name: str, *words: str) -> Job:
        return cluster.launch(root / name / "run", f"--job-name={name}", *words)

    gpus = ("--nodes=2", "--gpus-per-node=4", "--processes-per-node=1", "--cpus-per-task=1", "run.device=cpu")
    on_two, half_an_hour = ("--sbatch=--nodelist=n01,n02",), ("--time=30", "--signal-lead-s=60")
    jobs = {
        # The limit of two minutes warns a minute or so after the start, so that it has to train by then.
        "limit": launch("limit", *TWO_NODES, *on_two, *ENDLESS, "--time=2", "--signal-lead-s=30"),
        "undisturbed": launch("undisturbed", *TWO_NODES, *on_two, *ENDLESS, *half_an_hour),
    }
    jobs["limit"].until(lambda: jobs["limit"].steps)
    jobs |= {
        "requeued": launch("requeued", *TWO_NODES, *on_two, *ENDLESS, *half_an_hour, "train.steps=60"),
        "preempted": launch("preempted", *gpus, *on_two, *ENDLESS, *half_an_hour),
        "killed": launch("killed", *TWO_NODES, "--sbatch=--nodelist=n03,n04", *ENDLESS, *half_an_hour),
        "zero2": launch("zero2", *TWO_NODES, *on_two, "--strategy=zero2", "train.steps=12", *half_an_hour),
        "once": launch("once", "--processes-per-node=2", "--no-requeue", *ENDLESS, *half_an_hour),
        **_sweep(cluster, root / "sweep"),
    }
    # Only the one holds GPUs: no other has to go.
    urgent = ("--partition=urgent", "--nodes=2", "--gres=gpu:4", "--nodelist=n01,n02", "--output=/dev/null")
    disturb = {
        "requeued": ("scontrol", "requeue", jobs["requeued"].id),
        "seed 0": ("scancel", "--signal=USR1", jobs["seed 0"].id),
        "preempted": ("sbatch", *urgent, "--wrap=true"),
        "once": ("scancel", "--signal=USR1", jobs["once"].id),
    }
    while disturb:
        jobs["undisturbed"].until(lambda: any(jobs[name].steps >= 3 for name in disturb))
        for name in [name for name in disturb if jobs[name].steps >= 3]:
            cluster.run(*disturb.pop(name))
    return jobs


def _sweep(cluster: Cluster, folder: Path) -> dict[str, Job]:
    """The shipped script by hand: only what must be edited is."""
    folder.mkdir()
    shipped = (ROOT / "launch" / "slurm" / "sweep.sbatch").read_text()
    script = fill_in(
        shipped,
        {"array": "0-1", "gres": None, "cpus-per-task": "1", "output": "log-%a.out"},
        {
            "LAUNCH": str(ROOT / "launch"), "ACCELERATE_FILE": "cpu.yaml", "PROCESSES_PER_NODE": 1,
            "PYTHON": sys.executable, "RUN_DIR": str(folder), "SEEDS": ["0", "1"], "BACKBONES": ["mlp"],
        },
    )  # fmt: skip
    (folder / "sweep.sbatch").write_text(script)
    words = ("sinusoid", "run.device=cpu", *FAST, "train.episodes_per_step=40", "train.steps=100")
    number = cluster.run("sbatch", "--parsable", "sweep.sbatch", *words, cwd=folder).strip()
    return {
        f"seed {seed}": Job(cluster, f"{number}_{seed}", folder / f"mlp-seed{seed}", folder / f"log-{seed}.out")
        for seed in (0, 1)
    }


def assert_same_curve(disturbed: Job, jobs: dict[str, Job]) -> None:
    """What the disturbed run has recorded is bit for bit what the undisturbed one has."""
    lines = disturbed.metrics()
    jobs["undisturbed"].until(lambda: jobs["undisturbed"].steps >= len(lines))
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines == jobs["undisturbed"].metrics()[: len(lines)]


def test_scontrol_requeue_resumes_and_finishes_exactly(jobs):
    job = jobs["requeued"]
    assert job.ended() == "COMPLETED 0:0", job.output
    assert len(job.starts) == 2 and job.starts[1] > 0, job.output
    assert "2 processes (ddp)" in job.output
    assert (job.status["state"], job.status["restart"], job.steps) == ("finished", 1, 60)
    assert_same_curve(job, jobs)


def test_an_array_runs_each_seed_and_one_task_is_requeued_alone(jobs):
    tasks = [jobs["seed 0"], jobs["seed 1"]]
    for task in tasks:
        assert task.ended() == "COMPLETED 0:0", task.output
        assert (task.status["state"], task.status["world"], task.steps) == ("finished", 1, 100)
    # The first task has the number of the whole array, which must not be requeued with it.
    assert [len(task.starts) for task in tasks] == [2, 1]
    assert f"Stopped by SIGUSR1 after step {tasks[0].starts[1]} of" in tasks[0].output
    assert tasks[0].metrics()[0]["loss"] != tasks[1].metrics()[0]["loss"]


def test_zero2_on_two_nodes(jobs):
    job = jobs["zero2"]
    assert job.ended() == "COMPLETED 0:0", job.output
    assert "2 processes (zero2)" in job.output
    assert json.loads((job.folder / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    assert (job.status["state"], job.status["world"], job.steps) == ("finished", 2, 12)


def test_where_a_job_may_not_be_requeued_it_ends_with_75(jobs):
    job = jobs["once"]
    assert job.ended() == "FAILED 75:0", job.output
    assert (job.status["state"], job.status["world"], job.status["step"]) == ("stopped", 2, job.steps)


def test_a_preempted_job_with_pretended_gpus_saves_and_comes_back(jobs):
    job = jobs["preempted"]
    job.until(lambda: len(job.starts) == 2)
    job.until(lambda: job.steps >= job.starts[1] + MORE)
    assert f"after step {job.starts[1]} of" in job.output, "not saved, but killed"
    assert_same_curve(job, jobs)
    job.cancel()


def test_a_killed_node_is_named_and_the_job_comes_back(cluster, jobs):
    job = jobs["killed"]
    job.until(lambda: job.steps >= 10)
    assert cluster.tool("kill-node", "n04").returncode == 0
    job.until(lambda: "error: " in job.output, timeout_s=60)
    job.until(lambda: "n04" in job.output, timeout_s=60)
    job.until(lambda: job.state != "RUNNING", timeout_s=60)
    assert cluster.tool("start-node", "n04").returncode == 0
    job.until(lambda: len(job.starts) == 2)
    assert job.starts[1] > 0 and job.starts[1] % 7 == 0, "not from a checkpoint"
    job.until(lambda: job.steps >= job.starts[1] + MORE)
    assert_same_curve(job, jobs)
    job.cancel()


def test_the_warning_before_the_time_limit_saves_and_requeues(jobs):
    job = jobs["limit"]
    # On a slow machine the warning may come before training does; then nothing is lost, and the next one counts.
    job.until(lambda: max(job.starts, default=0) > 0, timeout_s=400)
    job.until(lambda: job.steps >= job.starts[-1] + MORE)
    assert f"Stopped by SIGUSR1 after step {job.starts[-1]} of" in job.output
    assert not any(end.startswith("TIMEOUT") for end in job.ends), "it was killed at its limit"
    assert_same_curve(job, jobs)
    job.cancel()


def test_a_cancelled_job_saves_and_stays_away(jobs):
    job = jobs["undisturbed"]
    job.cancel()
    assert job.ended().startswith("CANCELLED"), job.output
    assert len(job.ends) == 1 and job.status["restart"] == 0
    assert (job.status["state"], job.status["step"]) == ("stopped", job.steps), job.output
    assert "goes back into the queue" not in job.output
