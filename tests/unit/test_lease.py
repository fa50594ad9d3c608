"""One writer a run folder: whoever is alive, whoever was requeued, with and without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from cml_dist.errors import CheckpointError
from cml_dist.run import lease as leases
from cml_dist.run.lease import Lease
from cml_dist.run.status import Start, this_start

HOLDER = """
import os, sys
from pathlib import Path
from cml_dist.run.lease import Lease
from cml_dist.run.status import Start
lease = Lease(Path(sys.argv[1]), Start("n01", os.getpid(), "7"))
if os.fork() == 0:  # a loader process, which outlives its trainer
    print("held", flush=True)
    os.execvp("sleep", ["sleep", "100"])
sys.stdin.read()
"""


def start(job: str | None = None, requeued: int = 0) -> Start:
    return Start("n01", os.getpid(), job, requeued)


def refused(folder, who: Start) -> None:
    with pytest.raises(CheckpointError, match=f"another process trains in run.dir.*pid {os.getpid()} on n01"):
        Lease(folder, who)


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(leases, "AGAIN_S", 0.0)


def test_a_second_trainer_is_refused_while_the_first_lives(tmp_path):
    first = Lease(tmp_path, start("7"))
    for other in (start(), start("8"), start("7"), start("8", 3)):
        refused(tmp_path, other)
    first.check()
    first.release(began=True)
    Lease(tmp_path, start()).release(began=True)


def test_a_requeued_job_takes_over_from_its_earlier_start_which_notices(tmp_path):
    cut_off, requeued = Lease(tmp_path, start("7", 0)), Lease(tmp_path, start("7", 1))
    with pytest.raises(CheckpointError, match="a later start of this run has taken over"):
        cut_off.check()
    refused(tmp_path, start("7", 1))
    cut_off.release(began=True)  # its end takes nothing away
    requeued.check()
    refused(tmp_path, start())
    requeued.release(began=True)
    Lease(tmp_path, start()).release(began=True)


def test_a_lost_start_that_its_launcher_starts_again_does_not_take_the_folder_back(tmp_path):
    cut_off, requeued = Lease(tmp_path, start("7", 0)), Lease(tmp_path, start("7", 1))
    cut_off.release(began=True)
    with pytest.raises(CheckpointError, match="a later start of this run has taken over"):
        Lease(tmp_path, start("7", 0))
    requeued.check()
    requeued.release(began=True)


def test_without_locks_the_later_start_has_the_folder_and_the_earlier_one_notices(tmp_path, no_locks):
    earlier, later = Lease(tmp_path, start("7", 1)), Lease(tmp_path, start("8"))
    later.check()
    with pytest.raises(CheckpointError, match="has taken over"):
        earlier.check()
    earlier, requeued = Lease(tmp_path, start("7", 1)), Lease(tmp_path, start("7", 2))
    with pytest.raises(CheckpointError, match="has taken over"):
        Lease(tmp_path, start("7", 1))
    requeued.check()


def test_a_killed_trainer_leaves_the_folder_free_whoever_it_has_started(tmp_path):
    command, pipes = [sys.executable, "-c", HOLDER, tmp_path], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, start_new_session=True) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"pid {holder.pid} on n01"):
            Lease(tmp_path, start())
        holder.kill()
        holder.wait()
        Lease(tmp_path, start()).release(began=True)
        os.killpg(holder.pid, 9)


def test_of_a_run_that_never_began_nothing_is_left(tmp_path):
    Lease(tmp_path, start()).release(began=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ['{"generation": 1', "0123456789abcdef", "[1]"])
def test_a_lock_that_is_torn_or_of_an_earlier_version_counts_by_its_lock_alone(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    Lease(tmp_path, start("7", 1)).release(began=True)
    with open(tmp_path / "lock", "r+") as file:
        file.truncate()
        file.write(text)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process trains"):
            Lease(tmp_path, start("7", 1))


def test_a_start_knows_its_job(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    assert (this_start().job, this_start().restart) == (None, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    here = this_start()
    assert (here.job, here.requeued, here.in_place, here.restart) == ("7", 2, 1, 3)
