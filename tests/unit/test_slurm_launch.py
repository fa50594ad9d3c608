"""The batch scripts, and what fills them in, without a SLURM: its commands are played by scripts of a few lines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from cml_dist.cli import build_parser, main
from cml_dist.errors import CheckpointError, CmlError, ConfigError, WorldError
from cml_dist.tools import slurm
from cml_dist.tools.slurm import END, prepare, submit

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("**/*.s[hb]*"))
BATCH = [path for path in SCRIPTS if path.suffix == ".sbatch"]


def request(*overrides: str, **options: object) -> Namespace:
    """The parsed command line; an option of value True has none."""
    words = {"nodes": 2, "time": "04:00:00"} | options
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in words.items()]
    return build_parser().parse_args(["launch", "slurm", "sinusoid", *overrides, *flags])


def play(folder: Path, **programs: str) -> str:
    """A PATH on which these programs are shell scripts of ours."""
    folder.mkdir(exist_ok=True)
    for name, lines in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# --------------------------------------------------------------------------- the scripts themselves


def test_there_is_a_script_for_one_node_for_several_and_for_a_sweep():
    assert [path.stem for path in BATCH] == ["multi_node", "one_node", "sweep"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_shellcheck_has_nothing_to_say(path):
    assert path.read_text().count("\n") < 60
    beside_python = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (make test installs it)")
    run = subprocess.run([shellcheck, path], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout


def played_job(tmp_path: Path, step: int, status: int, queue: str, requeue: int, **environment: str) -> tuple[int, str]:
    """(exit code, output) of job.sh where the step, ``status --check``, squeue and scontrol answer like this.

    In ``environment``: HERE and ALL, exit codes of srun where the first node, or all, are asked whether they live.
    """
    path = play(
        tmp_path / "bin",
        srun=f'case "$*" in *--overlap*--nodes=1*) exit $HERE ;; *--overlap*) exit $ALL ;; *) exit {step} ;; esac',
        squeue=f"echo {queue}",
        scontrol=f'echo "scontrol $*"; exit {requeue}',
        python=f'echo "run: ${{STATE:-stopped}}"; exit {status}',
    )
    env = {"PATH": path, "LAUNCH": str(ROOT / "launch"), "SLURM_JOB_ID": "7", "PYTHON": "python", "RUN_DIR": "run"}
    env |= {"MAX_RESTARTS": "1", "SLURMD_NODENAME": "n01", "SLURM_JOB_NUM_NODES": "4", "HERE": "0", "ALL": "0"}
    run = subprocess.run(
        ["bash", str(ROOT / "launch/slurm/job.sh"), "--", "glyphs"],
        env=env | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("step", "status", "queue", "requeue", "code", "requeued"),
    [
        (0, 0, "RUNNING None", 0, 0, False),  # finished
        (0, 75, "RUNNING None", 0, 0, True),  # stopped and saved
        (0, 3, "RUNNING None", 0, 0, True),  # stopped before there was a run
        (0, 75, "COMPLETING TimeLimit", 0, 0, True),
        (0, 75, "COMPLETING None", 0, 75, False),  # scancel
        (0, 75, "RUNNING None", 1, 75, True),  # SLURM refuses
        (0, 127, "RUNNING None", 0, 127, False),  # nobody knows whether it is finished: no job for ever
        (1, 75, "RUNNING None", 0, 1, False),  # failed, after an earlier start was stopped
        (137, 75, "RUNNING None", 0, 137, False),
    ],
)
def test_how_a_job_ends(tmp_path, step, status, queue, requeue, code, requeued):
    found, output = played_job(tmp_path, step, status, queue, requeue)
    assert (found, "scontrol requeue 7\n" in output) == (code, requeued), output


def test_a_step_that_lost_a_node_goes_back_into_the_queue(tmp_path):
    code, output = played_job(tmp_path, 1, 1, "RUNNING None", 0, ALL="1")
    assert code == 0 and "scontrol requeue 7\n" in output
    # Where SLURM itself does not answer, or the user cancelled, nothing is known of nodes.
    code, output = played_job(tmp_path, 1, 1, "RUNNING None", 0, ALL="1", HERE="1")
    assert code == 1 and "scontrol" not in output
    code, output = played_job(tmp_path, 137, 1, "COMPLETING None", 0, ALL="1")
    assert code == 75 and "scontrol" not in output


def test_a_run_folder_that_nobody_else_sees_is_said(tmp_path):
    nowhere = {"STATE": "unknown (there is no such folder)"}
    assert "scontrol" in played_job(tmp_path, 0, 3, "RUNNING None", 0, **nowhere, SLURM_RESTART_COUNT="1")[1]
    code, output = played_job(tmp_path, 0, 3, "RUNNING None", 0, **nowhere, SLURM_RESTART_COUNT="2")
    assert code == 3 and "three steps ended in order, but run has no run; put it where all nodes see it" in output
    # An old view of a shared folder.
    assert "scontrol" in played_job(tmp_path, 0, 3, "RUNNING None", 0, STATE="running", SLURM_RESTART_COUNT="2")[1]


def test_a_job_does_not_come_back_for_ever(tmp_path):
    assert "scontrol" in played_job(tmp_path, 0, 75, "RUNNING None", 0, SLURM_RESTART_COUNT="199")[1]
    code, output = played_job(tmp_path, 0, 75, "RUNNING None", 0, SLURM_RESTART_COUNT="200")
    assert code == 75 and "job 7 was requeued 200 times" in output and "scontrol" not in output


def test_without_restarts_in_place_a_stopped_run_would_be_taken_for_a_failed_one(tmp_path):
    code, output = played_job(tmp_path, 0, 75, "RUNNING None", 0, MAX_RESTARTS="0")
    assert code == 2 and output == "error: MAX_RESTARTS is 0; set it to 1 or more in the batch script\n"


def test_a_task_of_an_array_requeues_itself_alone(tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    assert "scontrol requeue 7_0\n" in played_job(tmp_path, 0, 75, "RUNNING None", 0, **array)[1]


LAUNCHER = """
import os, signal, subprocess, sys, time
here, name = sys.argv[1:]
listened = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
for number in listened:
    assert signal.getsignal(number) == signal.SIG_IGN, "a process that is not up yet would be killed"
worker = subprocess.Popen([sys.executable, __file__, here, "worker"]) if name == "launcher" else None
def note(number, frame):
    with open(os.path.join(here, name), "a") as file:
        print(number, file=file)
for number in listened:
    signal.signal(number, note)
if worker is not None:
    sys.exit(worker.wait())
open(os.path.join(here, "up"), "w").close()
while not os.path.exists(os.path.join(here, name)) or open(os.path.join(here, name)).read().count("\\n") < 2:
    time.sleep(0.05)
sys.exit(5)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_signals_reach_the_processes_again_and_again_and_never_the_launcher(tmp_path, number):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    node = node_environment(tmp_path, f'exec {sys.executable} {tmp_path}/launcher.py {tmp_path} launcher')
    process = subprocess.Popen(["bash", str(ROOT / "launch/slurm/node.sh"), "glyphs"], env=node)
    try:
        for _ in range(6000):
            if (tmp_path / "up").exists():
                break
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=600) == 5, "the launcher's exit code is the node's"
    finally:
        process.kill()
    assert set((tmp_path / "worker").read_text().split()) == {str(int(signal.SIGUSR1))}
    assert not (tmp_path / "launcher").exists()


ALONE = """
import os, subprocess, sys, time
def run(*words, **variables):
    return subprocess.Popen(["sleep", *words], env={**os.environ, **variables})
run("1").wait()
time.sleep(4)  # nothing of the run has been here yet: longer than REJOIN_S, and fine
worker = run("2", TORCHELASTIC_RUN_ID="none")
open(sys.argv[1], "w").close()
time.sleep(100)  # in vain; the worker that has ended is not buried
"""


def test_a_launcher_that_is_left_alone_ends_but_not_at_the_first_start(tmp_path):
    (tmp_path / "launcher.py").write_text(ALONE)
    node = node_environment(tmp_path, f"exec {sys.executable} {tmp_path}/launcher.py {tmp_path}/met", "n[1-2]", count=2)
    command = ["bash", str(ROOT / "launch/slurm/node.sh"), "glyphs"]
    run = subprocess.run(command, env=node | {"REJOIN_S": "2"}, capture_output=True, text=True, timeout=600)
    assert (tmp_path / "met").exists(), run.stderr
    assert run.returncode == 1 and "the other nodes did not come back within 2 s" in run.stderr


def node_environment(tmp_path: Path, python: str, nodes: str = "n01", count: int = 1) -> dict[str, str]:
    return {
        "PATH": play(tmp_path / "bin", python=python), "LAUNCH": "/launch", "ACCELERATE_FILE": "ddp.yaml",
        "PROCESSES_PER_NODE": "4", "MAX_RESTARTS": "1", "PYTHON": "python", "RUN_DIR": "runs/a", "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_NODES": str(count), "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "7",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n01", "n01"), ("n01,n02", "n01"), ("n[01-02]", "n01"), ("gpu-a[3,7-9]", "gpu-a3"),
        ("rack[1-2]n[03,05],x7", "rack1n03"), ("x7,n[1-2]", "x7"), ("a[10-12]-ib,b1", "a10-ib"),
    ],
)  # fmt: skip
def test_each_node_finds_rank_and_address_by_itself(tmp_path, nodes, first):
    env = node_environment(tmp_path, 'printf "%s\\n" "$@"', nodes, count=3)
    command = ["bash", str(ROOT / "launch/slurm/node.sh"), "glyphs", "a=b c"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    words = run.stdout.splitlines()
    option = dict(zip(words, words[1:], strict=False))
    assert option["--main_process_ip"] == first, run.stderr
    assert (option["--machine_rank"], option["--num_machines"], option["--num_processes"]) == ("1", "3", "12")
    assert words[-4:] == ["glyphs", "a=b c", "run.dir=runs/a", "parallel.processes=12"]
    assert 15000 <= int(option["--main_process_port"]) < 30000


def test_no_address_no_run(tmp_path):
    env = node_environment(tmp_path, "exit 0")
    del env["SLURM_STEP_NODELIST"]
    run = subprocess.run(["bash", str(ROOT / "launch/slurm/node.sh"), "x"], env=env, capture_output=True, text=True)
    assert run.returncode != 0 and "SLURM_STEP_NODELIST" in run.stderr


# --------------------------------------------------------------------------- filling them in


def what_job_sh_gets(tmp_path: Path, script: str, **environment: str) -> list[str]:
    """RUN_DIR and the words that a filled-in script hands to job.sh, where job.sh prints them."""
    launch = tmp_path / "launch"
    (launch / "slurm").mkdir(parents=True, exist_ok=True)
    (launch / "slurm" / "job.sh").write_text('printf "%s\\0" "$RUN_DIR" "$PYTHON" "$PROCESSES_PER_NODE" "$@"\n')
    script = script.replace(str(ROOT / "launch"), str(launch))
    env = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path), **environment}
    run = subprocess.run(["bash", "-u"], input=script, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout.split("\0")[:-1]


def test_processes_without_an_episode_are_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["launch", "slurm", "sinusoid", "--nodes=4", "--gpus-per-node=8", "--time=1:0:0", "--dry-run"]
    for episodes, words in ((32, ""), (4, "32 processes share 4 episodes a meta-step: 28 have nothing to do")):
        assert main([*command, f"train.episodes_per_step={episodes}"]) == 0
        out, err = capsys.readouterr()
        assert words in " ".join(err.split()) and bool(err) == bool(words)
        assert out.startswith("#!/bin/bash\n")


def test_only_settings_are_replaced_and_words_arrive_as_they_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = ("model.hidden=[8, 8]", "run.dir=a b/it's", 'optim.name="sgd"')
    asked = request(*odd, gpus_per_node=4, partition="gpu", account="us", constraint="a100|h100", sbatch="--mem=64G")
    asked.sbatch.append("--exclusive")
    batch = prepare(asked)
    shipped = (ROOT / "launch/slurm/multi_node.sbatch").read_text()
    assert batch.script.partition(END)[2] == shipped.partition(END)[2] != ""
    directives = [line.removeprefix("#SBATCH ") for line in batch.script.splitlines() if line.startswith("#SBATCH")]
    for line in (
        "--nodes=2", "--gres=gpu:4", "--cpus-per-task=16", "--time=04:00:00", "--signal=USR1@300", "--requeue",
        "--ntasks-per-node=1", "--open-mode=append", "--partition=gpu", "--account=us", "--constraint='a100|h100'",
        "--mem=64G", "--exclusive",
    ):  # fmt: skip
        assert directives.count(line) == 1, line
    got = what_job_sh_gets(tmp_path, batch.script)
    assert got == [str(tmp_path / "a b/it's"), sys.executable, "4", "--", "sinusoid", "model.hidden=[8, 8]", odd[2]]


def test_without_gpus_it_runs_on_cpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch = prepare(request(processes_per_node=3, nodes=1, no_requeue=True))
    assert "#SBATCH --gres" not in batch.script and "#SBATCH --no-requeue\n" in batch.script
    assert "#SBATCH --requeue" not in batch.script and "ACCELERATE_FILE=cpu.yaml" in batch.script
    assert "CONFIG=(sinusoid run.device=cpu)\n" in batch.script


def test_a_container_sees_the_folder_and_the_launch_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch = prepare(request(gpus_per_node=1, container="nvcr.io#a/b:1", container_mounts="/data:/data"))
    mounts = f"/data:/data,{tmp_path}:{tmp_path},{tmp_path}/launch:{tmp_path}/launch"
    assert what_job_sh_gets(tmp_path, batch.script)[1:7] == [
        "python", "1", "--container-image=nvcr.io#a/b:1", f"--container-mounts={mounts}",
        f"--container-workdir={tmp_path}", "--",
    ]  # fmt: skip


def test_an_image_file_is_named_by_its_path_and_a_run_elsewhere_is_mounted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.sqsh").touch()
    mounts = {"container_mounts": "/data,/scratch/me:/runs:rw"}
    batch = prepare(request("run.dir=/runs/a", gpus_per_node=1, container="image.sqsh", **mounts))
    assert f"--container-image={tmp_path}/image.sqsh" in what_job_sh_gets(tmp_path, batch.script)


def test_a_run_folder_that_the_container_does_not_see_is_refused(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    monkeypatch.chdir(here)
    inside = {"gpus_per_node": 1, "container": "a/b:1"}
    with pytest.raises(ConfigError, match=f"run.dir is {there}/run, which the container does not see"):
        prepare(request(f"run.dir={there}/run", **inside, container_mounts=f"/data,{tmp_path}/other:/other:ro"))
    for mounts in (f"/data:/data,{there}:{there}:rw", str(tmp_path)):
        prepare(request(f"run.dir={there}/run", **inside, container_mounts=mounts))


@pytest.mark.parametrize(
    ("options", "overrides", "words"),
    [
        ({"gpus_per_node": 0}, (), "neither GPUs nor processes were asked for"),
        ({"strategy": "zero4"}, (), "--strategy is zero4; use one of cpu, ddp, zero1"),
        ({"strategy": "zero2"}, ("run.precision=fp64",), "DeepSpeed reduces and updates in float32"),
        ({"strategy": "zero2"}, ("parallel.strategy=ddp",), "sets up DeepSpeed's zero2"),
        ({}, ("train.step=5",), "did you mean train.steps?"),
        ({}, ("parallel.processes=4",), "parallel.processes is 4, but 2 x 8 processes were asked for"),
        ({}, ("run.stop_signals=[SIGTERM]",), "add SIGUSR1 to run.stop_signals"),
        ({"sbatch": "mem=4"}, (), "--sbatch is 'mem=4'"),
        ({"sbatch": "--time=9"}, (), "--sbatch is '--time=9', which the batch script depends on"),
        ({"container": "a/b"}, ("run.dir=/else/where",), "run.dir is /else/where, which the container does not see"),
        ({"job_name": "a b"}, (), "--job-name is 'a b'"),
        ({"container_mounts": "/a:/a"}, (), "--container-mounts is given without --container"),
    ],
)
def test_what_cannot_be_is_said_before_the_job_waits_for_hours(tmp_path, monkeypatch, options, overrides, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        prepare(request(*overrides, **{"gpus_per_node": 8, **options}))
    assert words in str(error.value)


@pytest.mark.parametrize("option", ["nodes", "max-restarts", "signal-lead-s"])
def test_numbers_that_cannot_be_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        main(["launch", "slurm", "sinusoid", "--time=60", f"--{option}=0"])
    assert f"argument --{option}: it is 0; give 1 or more" in capsys.readouterr().err


def test_a_folder_with_another_run_is_refused(tmp_path, monkeypatch):
    from cml_dist.config.load import dump_config, load_config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(dump_config(load_config("sinusoid")))
    prepare(request("run.dir=a", gpus_per_node=1))
    with pytest.raises(CheckpointError, match="optim.lr was 0.001, is 0.5"):
        prepare(request("run.dir=a", "optim.lr=0.5", gpus_per_node=1))


# --------------------------------------------------------------------------- submitting


COMMAND = ["launch", "slurm", "sinusoid", "--nodes=2", "--gpus-per-node=4", "--time=60", "run.dir=a"]


def test_a_job_is_submitted_and_one_is_told_how_to_follow_and_cancel_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", play(tmp_path / "bin", sbatch='cat > submitted; echo "12;cluster"'))
    assert main(COMMAND) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "Submitted job 12: 2 x 4 GPUs"
    for command in ("squeue --jobs=12", f"tail -F {tmp_path}/slurm-cml-dist-12.out", f"cml-dist status {tmp_path}/a",
                    "scancel 12"):  # fmt: skip
        assert sum(line.endswith(command) for line in said) == 1, command
    submitted = (tmp_path / "submitted").read_text()
    assert main([*COMMAND, "--dry-run"]) == 0
    assert capfd.readouterr().out == submitted


def test_what_sbatch_refuses_is_passed_on_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = r"sbatch: error: invalid partition: x\nsbatch: error: Batch job failed\n"
    refusal = f'cat > /dev/null; printf "{words}" >&2; exit 1'
    monkeypatch.setenv("PATH", play(tmp_path / "bin", sbatch=refusal))
    with pytest.raises(CmlError, match="^sbatch refused the job: invalid partition: x; Batch job failed; correct"):
        submit(prepare(request(gpus_per_node=1)))


def test_without_sbatch_one_is_sent_to_a_login_node(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(WorldError, match="there is no sbatch on this machine; run this on a login node"):
        submit(prepare(request(gpus_per_node=1)))
