"""The batch scripts on a real SLURM of four nodes: started, stopped, requeued, broken, and the curve is the same.

All jobs are in the queue at once. How long a meta-step takes here, nobody knows: what has no end of its own is
cancelled once it has shown what it should.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from slurm_lab import Cluster, Job

from cml_dist.run.folder import RunFolder

TWO_NODES = ("--nodes=2", "--processes-per-node=1")
ENDLESS = ("train.steps=100000", "train.episodes_per_step=40", "run.precision=fp64", "checkpoint.every=7")
ZERO2_STEPS = 40
TASKS = [f"backbone={backbone},seed={seed}" for backbone in ("test_resnet", "conv4") for seed in (0, 1)]
"""Of the array, in its order."""

SWEEP = """
base: glyphs
set: {parallel.threads: 1, model.filters: 4, domain.ways: 2, domain.queries: 2, train.steps: 30,
      train.episodes_per_step: 8, eval.every: 0, eval.val_episodes: 2, eval.episodes: 2}
axes: {model.backbone: [test_resnet, conv4]}
seeds: 2
dir: runs
"""

IN_HASTE = {"REJOIN_S": "10", "SLURM_WAIT": "5"}
"""Seconds that a launcher waits for a lost node, and srun after it; 45 and 60 by themselves."""

MORE = 5
"""Meta-steps after a resume that are compared."""

LONGEST_S = 900
"""On a busy machine: with two cores and a load of 20 all of it took 450 s."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LONGEST_S + 300)]


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, tmp_path_factory) -> dict[str, Job]:
    """Everything runs side by side; each job's script is played to its end, or to what went wrong."""
    root = tmp_path_factory.mktemp("slurm")

    def launch(name: str, *words: str, **environment: str) -> Job:
        return cluster.launch(root / name / "run", f"--job-name={name}", *words, **environment)

    gpus = ("--nodes=2", "--gpus-per-node=4", "--processes-per-node=1", "--cpus-per-task=1", "run.device=cpu")
    on_two, half_an_hour = ("--sbatch=--nodelist=n01,n02",), ("--time=30", "--signal-lead-s=60")
    zero2 = ("--strategy=zero2", *ENDLESS, "run.precision=fp32", *half_an_hour)
    jobs = {
        # The limit of two minutes warns a minute or so after the start, so that it has to train by then.
        "limit": launch("limit", *TWO_NODES, *on_two, *ENDLESS, "--time=2", "--signal-lead-s=30"),
        "undisturbed": launch("undisturbed", *TWO_NODES, *on_two, *ENDLESS, *half_an_hour),
    }
    jobs["limit"].until(lambda: jobs["limit"].steps)
    jobs |= {
        "requeued": launch("requeued", *TWO_NODES, *on_two, *ENDLESS, *half_an_hour, "train.steps=60"),
        "preempted": launch("preempted", *gpus, *on_two, *ENDLESS, *half_an_hour),
        "killed": launch("killed", *TWO_NODES, "--sbatch=--nodelist=n03,n04", *ENDLESS, *half_an_hour, **IN_HASTE),
        "zero2": launch("zero2", *TWO_NODES, *on_two, *zero2, f"train.steps={ZERO2_STEPS}"),
        "once": launch("once", "--processes-per-node=2", "--no-requeue", *zero2),
        **_sweep(cluster, root / "sweep"),
    }
    # Only the one holds GPUs: no other has to go.
    urgent = ("sbatch", "--partition=urgent", "--nodes=2", "--gres=gpu:4", "--nodelist=n01,n02", "--output=/dev/null")
    stop = ("scancel", "--signal=USR1")
    play(
        cluster,
        jobs,
        {
            "limit": goes_on(jobs["limit"]),
            "requeued": disturbed(jobs["requeued"], ("scontrol", "requeue", jobs["requeued"].id)),
            "preempted": goes_on(jobs["preempted"], (*urgent, "--wrap=true")),
            "killed": loses_a_node(jobs["killed"]),
            "zero2": disturbed(jobs["zero2"], (*stop, jobs["zero2"].id)),
            "once": disturbed(jobs["once"], (*stop, jobs["once"].id), at=ZERO2_STEPS),
            TASKS[0]: disturbed(jobs[TASKS[0]], (*stop, jobs[TASKS[0]].id)),
            **{task: disturbed(jobs[task]) for task in TASKS[1:]},
        },
    )
    return jobs


Script = Iterator[Callable[[], object]]
"""What is done to a job: it yields what has to come before it goes on."""


def disturbed(job: Job, *commands: tuple[str, ...], at: int = 3) -> Script:
    """After ``at`` steps these commands come over the job, which then runs to its end."""
    for command in commands:
        yield lambda: job.steps >= at
        job.cluster.run(*command)
    yield lambda: job.over


def goes_on(job: Job, *commands: tuple[str, ...]) -> Script:
    """The same for a job without an end: it resumes, is seen to train, and is cancelled."""
    for command in commands:
        yield lambda: job.steps >= 3
        job.cluster.run(*command)
    # On a slow machine the warning may come before training does; then nothing is lost, and the next one counts.
    yield lambda: job.resumed_at and job.steps >= job.resumed_at + MORE
    job.cancel()


def loses_a_node(job: Job) -> Script:
    """Its second node is killed, and comes back once the job has gone back into the queue."""
    yield lambda: job.steps >= 10
    assert job.cluster.tool("kill-node", "n04").returncode == 0
    killed_s = time.monotonic()
    yield lambda: "error: " in job.output and "n04" in job.output
    assert time.monotonic() - killed_s < 60, f"the failure was named late:\n{job.output}"
    yield lambda: "the other nodes did not come back" in job.output
    assert time.monotonic() - killed_s < 60 + int(IN_HASTE["REJOIN_S"]), f"the launcher ended late:\n{job.output}"
    yield lambda: job.state != "RUNNING"
    # What SLURM does by itself after SlurmdTimeout, and then once the node is back.
    job.cluster.run("scontrol", "update", "nodename=n04", "state=down", "reason=killed")
    # SLURM has one number for all starts of a job: what it still means to tell the dead node would end the next one.
    yield lambda: job.state == "PENDING" and re.search(r"^Agent queue size: +0$", job.cluster.run("sdiag"), re.M)
    assert job.cluster.tool("start-node", "n04").returncode == 0
    with suppress(AssertionError):  # refused where the node has come back by itself
        job.cluster.run("scontrol", "update", "nodename=n04", "state=resume")
    yield from goes_on(job)


def play(cluster: Cluster, jobs: dict[str, Job], scripts: dict[str, Script]) -> None:
    """Play all scripts at once; what goes wrong is kept in the job, for its own test."""
    end = time.monotonic() + LONGEST_S
    waiting = {name: next(script) for name, script in scripts.items()}
    while waiting:
        for name, come in list(waiting.items()):
            job = jobs[name]
            over = job.over  # asked first: it may end meanwhile
            try:
                if come():
                    waiting[name] = next(scripts[name])
                elif time.monotonic() > end or over:
                    raise AssertionError(f"job {job.id} is late, or over:\n{job.output}\n{cluster.run('squeue')}")
            except StopIteration:
                del waiting[name]
            except AssertionError as error:
                job.fault = error
                job.cancel()
                del waiting[name]
        time.sleep(1)


def _sweep(cluster: Cluster, folder: Path) -> dict[str, Job]:
    """An array by ``cml-dist sweep``; the same command again finds all of it in the queue."""
    folder.mkdir()
    (folder / "sweep.yaml").write_text(SWEEP)
    options = ("--slurm", "--time=30", "--processes-per-node=1", "--signal-lead-s=60", "--job-name=sweep")
    command = (sys.executable, "-m", "cml_dist", "sweep", "sweep.yaml", *options)
    number = re.search(r"^Submitted job (\d+): .* 4 runs$", cluster.run(*command, cwd=folder), re.M)[1]
    again = cluster.run(*command, cwd=folder)
    assert "runs: 4 in the queue\n" in again and "Submitted" not in again
    return {
        task: Job(cluster, f"{number}_{index}", folder / "runs" / task, folder / f"slurm-sweep-{number}_{index}.out")
        for index, task in enumerate(TASKS)
    }


def played(jobs: dict[str, Job], name: str) -> Job:
    """The job, whose script was played without a fault."""
    if jobs[name].fault is not None:
        raise jobs[name].fault
    return jobs[name]


def assert_same_curve(job: Job, undisturbed: Job) -> None:
    """What a disturbed run has recorded is bit for bit what the undisturbed one has."""
    lines = job.metrics()
    undisturbed.until(lambda: undisturbed.steps >= len(lines))
    assert job.resumed_at and len(lines) >= job.resumed_at + MORE
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines == undisturbed.metrics()[: len(lines)]


def test_scontrol_requeue_resumes_and_finishes_exactly(jobs):
    job = played(jobs, "requeued")
    assert job.ends[-1] == "COMPLETED 0:0", job.output
    assert len(job.starts) == 2, job.output
    assert "2 processes (ddp)" in job.output
    assert (job.status["state"], job.status["restart"], job.steps) == ("finished", 1, 60)
    assert_same_curve(job, jobs["undisturbed"])


def test_a_sweep_is_an_array_of_which_one_task_is_requeued_alone(jobs):
    tasks = [played(jobs, name) for name in TASKS]
    for task in tasks:
        assert task.ends[-1] == "COMPLETED 0:0", task.output
        assert (task.status["state"], task.status["world"], task.steps) == ("finished", 1, 30)
        config = RunFolder(task.folder).read_config()
        assert f"backbone={config.model.backbone},seed={config.run.seed}" == task.folder.name
    # The first task has the number of the whole array, which must not be requeued with it.
    assert [len(task.starts) for task in tasks] == [2, 1, 1, 1]
    assert f"Stopped by SIGUSR1 after step {tasks[0].starts[1]} of" in tasks[0].output
    assert len({task.metrics()[0]["loss"] for task in tasks}) == len(tasks)


def test_zero2_is_stopped_and_resumes_exactly(jobs):
    """Its curve on two nodes, with a requeue, is that of two processes on one node."""
    job, one_node = played(jobs, "zero2"), played(jobs, "once")
    assert job.ends[-1] == "COMPLETED 0:0", job.output
    assert "2 processes (zero2)" in job.output and "2 processes (zero2)" in one_node.output
    assert json.loads((job.folder / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    assert (job.status["state"], job.status["world"], job.steps) == ("finished", 2, ZERO2_STEPS)
    assert f"Stopped by SIGUSR1 after step {job.resumed_at} of" in job.output
    assert_same_curve(job, one_node)


def test_where_a_job_may_not_be_requeued_it_ends_with_75(jobs):
    job = played(jobs, "once")
    assert job.ends[-1] == "FAILED 75:0", job.output
    assert (job.status["state"], job.status["world"], job.status["step"]) == ("stopped", 2, job.steps)


def test_a_preempted_job_with_pretended_gpus_saves_and_comes_back(jobs):
    job = played(jobs, "preempted")
    assert f"after step {job.resumed_at} of" in job.output, "not saved, but killed"
    assert_same_curve(job, jobs["undisturbed"])


def test_a_killed_node_is_named_and_the_job_comes_back(jobs):
    job = played(jobs, "killed")
    assert "goes back into the queue" in job.output, "it was SLURM that saw the node go"
    assert job.resumed_at % 7 == 0, "not from a checkpoint"
    assert_same_curve(job, jobs["undisturbed"])


def test_the_warning_before_the_time_limit_saves_and_requeues(jobs):
    job = played(jobs, "limit")
    assert f"Stopped by SIGUSR1 after step {job.resumed_at} of" in job.output
    assert not any(end.startswith("TIMEOUT") for end in job.ends), "it was killed at its limit"
    assert_same_curve(job, jobs["undisturbed"])


def test_a_cancelled_job_saves_and_stays_away(jobs):
    job = jobs["undisturbed"]
    job.cancel()
    job.until(lambda: job.over)
    assert job.ends[-1].startswith("CANCELLED"), job.output
    assert len(job.ends) == 1 and job.status["restart"] == 0
    assert (job.status["state"], job.status["step"]) == ("stopped", job.steps), job.output
    assert "goes back into the queue" not in job.output
