"""A rank that is killed, stopped or hangs: it is named, and all ends soon; a launcher that may restarts the run in place.

The machine is busy while tests run, so times are asserted with a wide margin; benchmarks/ has measured ones.
"""

from __future__ import annotations

import itertools
import re
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from launching import finish, run, run_ranks, slow_imports, start, start_ranks, until
from test_train import command, lines

from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.status import read_status
from cml_dist.telemetry.metrics import read_metrics

FAULTY = str(Path(__file__).with_name("faulty_worker.py"))
SOON_S = 60.0
"""What is promised, a busy machine included."""

NAME = r"rank {} \(host \S+, pid \d+\)"
KILLED = f"error: {NAME} ended without a word, last seen in .+ \\(killed\\? out of memory\\?\\); run the same command again"
SILENT = f"error: no word from {NAME} for \\d+ s, last seen in "
HANGS = f"error: {NAME} did not move for \\d+ s in step 5, episode 1 of 1, and the others wait"

def left(mark: str) -> list[str]:
    """Processes that have ``mark`` in their environment: what is still there of a launch."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(f"{entry.name}: {(entry / 'cmdline').read_text()}")
    return found


def ends(
    processes: int, folder: Path, *overrides: str, fault: str, rank: int, launcher: bool = True
) -> tuple[str, float]:
    """(what a launch with a fault printed, seconds from the fault to its last process's end)."""
    mark = uuid.uuid4().hex
    how = run if launcher else run_ranks  # both wait for the last of the processes
    code, out = how(processes, FAULTY, *command(folder, *overrides), FAULT=fault, FAULTY_RANK=str(rank), MARK=mark)
    seconds = time.time() - float(re.search(r"^fault at (\S+)$", out, re.MULTILINE).group(1))
    print(f"{fault} of rank {rank} of {processes}: all ended after {seconds:.1f} s")
    assert code != 0, out
    assert not left(mark)
    return out, seconds


def logs(folder: Path, ranks: int) -> list[str]:
    """What each rank wrote into its own log."""
    return [(folder / "logs" / f"rank-{rank:05d}.log").read_text() for rank in range(ranks)]


def said_once(pattern: str, out: str) -> None:
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.match(pattern, errors[0]), out


@pytest.mark.parametrize(("processes", "rank"), [(2, 1), (3, 0)])
def test_a_killed_rank_is_named_once_and_all_end(tmp_path, processes, rank):
    folder = tmp_path / "run"
    out, seconds = ends(processes, folder, "train.episodes_per_step=6", fault="killed", rank=rank, launcher=False)
    said_once(KILLED.format(rank), out)
    assert seconds < SOON_S
    if rank != 0:  # who could say so
        status = read_status(folder / "status.json")
        assert status.state == "failed" and re.match(NAME.format(rank), status.reason), status


def test_a_rank_killed_before_there_is_a_process_group_is_named(tmp_path):
    out, seconds = ends(2, tmp_path / "run", fault="start", rank=1, launcher=False)
    said_once(KILLED.format(1), out)
    assert seconds < SOON_S


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_killed_in_its_imports_is_missed_without_any_launcher(tmp_path, killed):
    """Plain python, as on several machines: nobody else could know, and parallel.join_timeout_s ends the wait."""
    mark = uuid.uuid4().hex
    trains = ("-m", "cml_dist", *command(tmp_path / "run", "parallel.join_timeout_s=5"))
    ranks = start_ranks(2, *trains, MARK=mark, **slow_imports(tmp_path, killed))
    other = ranks[1 - killed]
    assert any("imports" in line for line in ranks[killed].stdout)
    ranks[killed].kill()
    missed = (r"rank 1: \S+ did not reach the rendezvous at \S+ within 5 s", "1 of 2 processes did not come within 5 s: rank 1")
    said_once(f"error: {missed[killed]}", finish(other))
    assert other.returncode == 1
    finish(ranks[killed])
    assert not left(mark)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_is_missed_and_does_not_stay(tmp_path, rank):
    """Without a launcher: who misses it ends it."""
    overrides = ("parallel.heartbeat_timeout_s=4",)
    out, seconds = ends(2, tmp_path / "run", *overrides, fault="stopped", rank=rank, launcher=False)
    said_once(SILENT.format(rank), out)
    assert seconds < SOON_S


def test_a_rank_that_hangs_is_named_and_every_rank_shows_its_stacks(tmp_path):
    folder = tmp_path / "run"
    out, seconds = ends(2, folder, "parallel.hang_timeout_s=5", fault="hangs", rank=1, launcher=False)
    said_once(HANGS.format(1), out)
    waiting, hanging = logs(folder, 2)
    assert re.search(f"^{NAME.format(1)}, at work in step 5, episode 1 of 1 for \\d+ s; its threads:$", hanging, re.M)
    assert re.search(f"^{NAME.format(0)}, waiting for others in the reduction of step 5 for", waiting, re.M), waiting
    assert "in hang_in_python" in hanging and "cml_dist/run/trainer.py" in waiting
    assert all(re.search(HANGS.format(1), log, re.M) for log in (waiting, hanging))
    assert seconds < SOON_S


@pytest.mark.parametrize(
    ("fault", "rank", "where"),
    [("hangs at the end", 0, "closing files and trackers"), ("hangs as it leaves", 1, "leaving the process group")],
)
def test_a_rank_that_hangs_after_everything_is_done_is_named(tmp_path, fault, rank, where):
    folder, short = tmp_path / "run", ("train.steps=2", "parallel.hang_timeout_s=5", "eval.final=false")
    out, seconds = ends(2, folder, *short, fault=fault, rank=rank, launcher=False)
    said_once(f"error: {NAME.format(rank)} did not move for \\d+ s in {where}, and the others wait", out)
    assert checkpoints.steps_in(folder / "checkpoints")[-1] == 2
    assert seconds < SOON_S


def test_a_lone_process_whose_data_hangs_is_ended_with_its_stacks(tmp_path):
    folder = tmp_path / "run"
    # Longer than a busy machine takes for any part of the start.
    overrides = ("domain.workers=1", "parallel.hang_timeout_s=15")
    out, seconds = ends(1, folder, *overrides, fault="data hangs", rank=0, launcher=False)
    here = "in step 5, episode 1 of 3"
    said_once(f"error: {NAME.format(0)} did not move for \\d+ s {here}; the log of each rank shows its threads; mend it, or", out)
    (log,) = logs(folder, 1)
    assert re.search(f"^{NAME.format(0)}, {here} for \\d+ s; its threads:$", log, re.M), log
    assert "cml_dist/run/stream.py" in log and "cml_dist/run/trainer.py" in log
    status = read_status(folder / "status.json")
    assert status.state == "failed" and re.match(f"{NAME.format(0)} did not move for", status.reason), status
    assert seconds < 15 + SOON_S


@pytest.mark.slow  # the hang is in the test before, a launcher's restart in test_train.py
def test_a_lone_process_that_hangs_is_started_again_by_its_launcher(tmp_path):
    folder = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "--max_restarts=1")
    arguments = command(folder, "parallel.hang_timeout_s=15", "checkpoint.every=3")
    code, out = run(1, *torchrun, FAULTY, *arguments, FAULT="hangs", FAULTY_RANK="0")
    assert code == 0, out
    assert "then the launcher starts all again from the last checkpoint (restart 1 of 1)" in out, out
    assert "Resuming at step 3 of 20" in out, out
    assert read_status(folder / "status.json").state == "finished"


@pytest.mark.slow  # ten seconds of sleep; the watch's own rule is in test_trainer.py
def test_an_episode_may_take_longer_than_a_rank_may_stand_still(tmp_path):
    folder = tmp_path / "run"
    overrides = ("method.inner_steps=6", "engine.name=adjoint", "parallel.hang_timeout_s=5", "eval.final=false")
    code, out = run_ranks(2, FAULTY, *command(folder, *overrides), FAULT="slow")
    assert code == 0, out
    assert read_metrics(folder / "metrics.jsonl")[4]["seconds"] > 10, "it was slow"


def test_a_rank_that_keeps_pythons_lock_shows_where_and_is_ended(tmp_path):
    folder = tmp_path / "run"
    out, seconds = ends(2, folder, "parallel.heartbeat_timeout_s=4", fault="keeps the lock", rank=1)
    said_once(SILENT.format(1), out)
    # By a handler that needs no lock; so soon after the start it may not know of the log yet.
    shown = out.partition("error: ")[0] + logs(folder, 2)[1]
    assert "Stack (most recent call first)" in shown and "in on_step" in shown, shown
    assert seconds < SOON_S


def trained(folder: Path) -> int:
    """Meta-steps that a run has done."""
    path = folder / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


@contextmanager
def running(folder: Path, *overrides: str) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:
    """(a launch of two ranks that trains, its ranks); at the end it goes on, and stops in order when it is asked to."""
    arguments = command(folder, "train.steps=1000000", "eval.every=0", "run.log_every=1000", *overrides)
    process = start(2, "-m", "cml_dist", *arguments)
    until(lambda: trained(folder) > 5 or process.poll() is not None)
    yield process, psutil.Process(process.pid).children()
    before = trained(folder)
    until(lambda: trained(folder) > before + 20 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    assert "Stopped by SIGTERM after step" in out and "error: " not in out, out


def test_neither_rubbish_on_every_port_nor_a_suspension_ends_a_run(tmp_path):
    noise = (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\n", b"\xff" * 100_000, b"\0" * 64, b"", b"[1]\n")
    limits = ("parallel.heartbeat_timeout_s=10", "parallel.hang_timeout_s=12")
    with running(tmp_path / "run", *limits) as (launch, ranks):
        found = [one for process in (psutil.Process(launch.pid), *ranks) for one in process.net_connections()]
        ports = {one.laddr.port for one in found if one.status == psutil.CONN_LISTEN}
        assert ports
        for port, words in itertools.product(ports, noise):
            with socket.create_connection(("localhost", port), timeout=5) as stranger, suppress(OSError):
                stranger.sendall(words)
        for rank in ranks:
            rank.suspend()
        time.sleep(15)  # longer than both limits
        for rank in ranks:
            rank.resume()


def test_the_first_rank_of_a_machine_verifies_for_all_and_all_fall_back_alike(tmp_path):
    folder = tmp_path / "run"
    arguments = command(folder, "checkpoint.every=5", "train.steps=10", "eval.every=0", "eval.final=false")
    code, out = run_ranks(2, "-m", "cml_dist", *arguments)
    assert code == 0, out
    before = lines(folder)
    good, newest = (checkpoints.path_of(folder / "checkpoints", step) for step in (5, 10))
    tensors = len(checkpoints.load(good).layout)
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    code, out = run_ranks(2, FAULTY, *arguments, FAULT="counts reads")
    assert code == 0 and "Resuming at step 5 of 10" in out, out
    assert all(f"{newest} is damaged" in log for log in logs(folder, 2))
    assert lines(folder) == before
    # Rank 0: the damaged one, the good one, and what it trains with; rank 1: that alone.
    assert [out.count(f"rank {rank} reads ") for rank in (0, 1)] == [3 * tensors, tensors]
