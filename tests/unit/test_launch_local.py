"""``cml-dist launch local`` and ``launch files``, and how the command treats its terminal: without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from cml_dist.cli import main
from cml_dist.tools.launch_files import launch_folder

PROGRAM = (sys.executable, "-m", "cml_dist")
LOCAL = ("launch", "local", "--processes", "2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--", "trian", "sinusoid"), "error: see cml-dist --help: argument COMMAND: invalid choice: 'trian'"),
        (("--", "train", "sinusoid", "--stepz"), "error: see cml-dist --help: unrecognized arguments: --stepz"),
        (("--",), "error: see cml-dist --help: the following arguments are required: COMMAND"),
        (("--", "train", "sinusoid", "train.stepz=5"), "error: sinusoid: train.stepz is not a setting; did you mean"),
        (("train", "sinusoid", "parallel.processes=3"), "error: parallel.processes is 3, but 2 processes were asked"),
        (("--config=zero9", "--", "train", "sinusoid"), "error: --config is zero9; use one of cpu, ddp, zero1"),
        (("--config=zero2", "--", "train", "sinusoid", "parallel.strategy=ddp"), "sets up DeepSpeed's zero2"),
    ],
)
def test_a_typo_is_one_line_before_anything_starts(words, said, capfd):
    try:
        code = main([*LOCAL, *words])
    except SystemExit as end:
        code = end.code
    lines = capfd.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and said in lines[0], lines


def test_ctrl_c_is_answered_at_once_and_ends_with_130_and_the_command_to_go_on(tmp_path):
    command = [*PROGRAM, *LOCAL, "--", "train", "sinusoid", f"run.dir={tmp_path / 'run'}"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        # The launcher, whose imports take seconds, has nothing to save yet.
        assert process.stdout.readline() == "Starting 2 processes by accelerate launch (ddp)\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "\n" and process.stdout.readline().startswith("Ctrl-C: ")
        out = process.stdout.read()
    assert process.returncode == 130, out
    again = f"--processes=2 --config=ddp -- train sinusoid run.dir={tmp_path}/run"
    assert out == f"To go on: cml-dist launch local {again}\n"


def test_launch_files_are_written_once(tmp_path, capfd):
    assert main(["launch", "files", str(tmp_path / "launch")]) == 0
    assert str(tmp_path / "launch/accelerate/zero2.yaml") in capfd.readouterr().out
    for kind in ("accelerate", "slurm"):
        for file in (launch_folder() / kind).iterdir():
            written = tmp_path / "launch" / kind / file.name
            assert written.read_bytes() == file.read_bytes()
            assert os.access(written, os.X_OK) == os.access(file, os.X_OK)
    for kind in ("accelerate", "slurm"):
        (tmp_path / "launch" / kind / "cpu.yaml").unlink(missing_ok=True)
    assert main(["launch", "files", str(tmp_path / "launch")]) == 2
    assert "is there already, and would be overwritten" in capfd.readouterr().err
    assert not (tmp_path / "launch/accelerate/cpu.yaml").exists(), "nothing is written where one cannot be"


@pytest.mark.parametrize("command", ["config --keys", "config glyphs"])
def test_who_reads_no_further_is_not_told_of_it(command):
    reads, writes = os.pipe()
    os.close(reads)
    words = [*PROGRAM, *command.split()]
    process = subprocess.run(words, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(writes)
    assert (process.returncode, process.stderr) == (141, "")


def test_a_call_in_a_world_of_several_returns_in_a_process_that_is_not_its_own(monkeypatch, capfd):
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    for name, word in (world | {"MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, word)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert main(["config", "sinusoid"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["train", "sinusoid", "parallel.strategy=single"])
    assert "2 processes run; set parallel.strategy=ddp" in capfd.readouterr().err
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


