"""One writer a run folder: whoever is alive, whoever was requeued, with and without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import time

import pytest

from cml_dist.errors import CheckpointError
from cml_dist.run import lease as leases
from cml_dist.run.lease import FRESH_S, LATER_S, Lease
from cml_dist.run.status import Start, this_start


@pytest.fixture(autouse=True)
def _no_open_files(monkeypatch):
    """Whatever a test forgets is closed, as when its process ends."""
    made = []
    take = Lease._take
    monkeypatch.setattr(Lease, "_take", lambda self: (made.append(self), take(self)))
    yield
    for lease in made:
        if lease._lock is not None:
            lease._lock.close()


def start(job: str | None = None, requeued: int = 0, launcher: str | None = None, in_place: int = 0, began=0) -> Start:
    return Start("n01", os.getpid(), job, requeued, launcher, in_place, began)


@pytest.fixture(params=["locks", "no locks"])
def locks(request, monkeypatch):
    if request.param == "no locks":

        def flock(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param == "locks"


def test_a_second_trainer_is_refused_while_the_first_lives(tmp_path, locks):
    first = Lease(tmp_path, start("7"))
    for other in (start(), start("8"), start("7"), start("8", 3)):
        with pytest.raises(CheckpointError, match=f"another process trains in run.dir.*pid {os.getpid()} on n01"):
            Lease(tmp_path, other)
    first.check()
    first.release(began=True)
    Lease(tmp_path, start()).release(began=True)


def test_a_requeued_job_takes_over_from_its_earlier_start_which_notices(tmp_path, locks):
    cut_off = Lease(tmp_path, start("7", 0))
    requeued = Lease(tmp_path, start("7", 1))
    requeued.check()
    for touch in (cut_off.check, cut_off.renew):
        with pytest.raises(CheckpointError, match="a later start of this run has taken over"):
            touch()
    cut_off.release(began=True)
    requeued.renew()  # the old one's end takes nothing away
    with pytest.raises(CheckpointError, match="another process trains"):
        Lease(tmp_path, start("7", 1))
    requeued.release(began=True)


def test_between_the_old_writers_end_and_the_new_ones_lock_no_third_gets_in(tmp_path, locks):
    cut_off = Lease(tmp_path, start("7", 0))
    requeued = Lease(tmp_path, start("7", 1))
    cut_off.release(began=True)
    for other in (start(), start("8")):  # the lock is free
        with pytest.raises(CheckpointError, match="another process trains"):
            Lease(tmp_path, other)
    requeued.check()
    requeued._lock.close()  # killed before it came to the lock: it is kept free for a minute alone
    Lease(tmp_path, start("7", 2)).release(began=True)
    Lease(tmp_path, start("7", 1)).release(began=True)
    cut_off, requeued = Lease(tmp_path, start("7", 0)), Lease(tmp_path, start("7", 1))
    cut_off.release(began=True)
    requeued._lock.close()
    old = time.time() - FRESH_S - 1
    os.utime(tmp_path / "lease.json", (old, old))
    Lease(tmp_path, start("8")).release(began=True)


def test_a_requeue_counts_more_than_any_restart_in_place(tmp_path, locks):
    Lease(tmp_path, start("7", 0, "a:5:10", 2))
    requeued = Lease(tmp_path, start("7", 1, "a:5:10", 0))
    with pytest.raises(CheckpointError, match="has taken over"):
        Lease(tmp_path, start("7", 0, "a:5:10", 3))
    requeued.check()


def test_a_lost_start_that_its_launcher_starts_again_does_not_take_the_folder_back(tmp_path, locks):
    """It lets the lock go when it notices that it was replaced, and who replaced it has not looked for it since."""
    cut_off = Lease(tmp_path, start("7", 0, "a:5:10", 0))
    requeued = Lease(tmp_path, start("7", 1, "a:5:10", 0))
    cut_off.release(began=True)
    with pytest.raises(CheckpointError, match="a later start of this run has taken over"):
        Lease(tmp_path, start("7", 0, "a:5:10", 1))
    requeued.renew()
    requeued._lock.close()  # killed: its number alone keeps nobody out for ever
    old = time.time() - LATER_S - 1
    os.utime(tmp_path / "lease.json", (old, old))
    Lease(tmp_path, start("7", 0, "a:5:10", 1)).release(began=True)


@pytest.mark.parametrize("job", ["7", None])
def test_a_launcher_takes_over_from_its_own_processes_alone(tmp_path, locks, job):
    cut_off = Lease(tmp_path, start(job, 0, "a:5:10", 0))
    with pytest.raises(CheckpointError, match="another process trains"):
        Lease(tmp_path, start(job, 0, "a:6:11", 1))  # another run in the same folder, refused and started again
    again = Lease(tmp_path, start(job, 0, "a:5:10", 1))
    again.check()
    with pytest.raises(CheckpointError, match="has taken over"):
        cut_off.check()


def test_a_restart_that_the_launcher_of_rank_0_does_not_count_takes_over_too(tmp_path, locks):
    """torchrun on several machines counts a restart only where the fault was."""
    killed = Lease(tmp_path, start("7", 0, "a:5:10", 0, began=100))
    killed._lock.close()
    again = Lease(tmp_path, start("7", 0, "a:5:10", 0, began=200))
    again.check()
    with pytest.raises(CheckpointError, match="has taken over"):
        Lease(tmp_path, start("7", 0, "a:5:10", 0, began=100))


def test_a_start_knows_its_job_and_its_launcher(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    assert (this_start().job, this_start().launcher, this_start().restart) == (None, None, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert f":{os.getppid()}:" in this_start().launcher and this_start().launcher[-1].isdigit()
    launcher = this_start().launcher  # in a step of SLURM too: each of its tasks may have started a world of its own
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    here = this_start()
    assert (here.job, here.launcher, here.requeued, here.in_place, here.restart) == ("7", launcher, 2, 1, 3)


def test_a_killed_trainer_leaves_the_folder_free(tmp_path, locks):
    killed = Lease(tmp_path, start())
    killed._lock.close()  # as the kernel does
    if not locks:
        with pytest.raises(CheckpointError, match="another process trains"):
            Lease(tmp_path, start())  # nobody can know yet
        old = time.time() - FRESH_S - 1
        os.utime(tmp_path / "lease.json", (old, old))
    Lease(tmp_path, start()).release(began=True)


def test_renewing_keeps_it_fresh_where_there_are_no_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    lease = Lease(tmp_path, start())
    old = time.time() - FRESH_S - 1
    os.utime(tmp_path / "lease.json", (old, old))
    lease.renew()
    with pytest.raises(CheckpointError, match="another process trains"):
        Lease(tmp_path, start())


def test_the_owner_is_known_to_live_while_it_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "FRESH_S", 0.3)
    lease = Lease(tmp_path, start())
    ends_s = time.monotonic() + 20
    old = time.time() - 100
    os.utime(tmp_path / "lease.json", (old, old))
    while time.time() - (tmp_path / "lease.json").stat().st_mtime > 50:
        assert time.monotonic() < ends_s
        time.sleep(0.01)
    lease.release(began=True)
    assert not lease._renewing.is_alive()


def test_of_a_run_that_never_began_nothing_is_left(tmp_path):
    Lease(tmp_path, start()).release(began=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made_anew", [True, False])
def test_a_lock_that_its_owner_removed_while_leaving_locks_nothing(tmp_path, monkeypatch, made_anew):
    flock = fcntl.flock

    def late(file, how):
        flock(file, how)
        (tmp_path / "lock").unlink()
        if made_anew:
            (tmp_path / "lock").touch()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(CheckpointError, match="another process trains"):
        Lease(tmp_path, start())


def test_a_torn_lease_file_is_nobodys(tmp_path):
    (tmp_path / "lease.json").write_text('{"token": "x"')
    Lease(tmp_path, start()).check()
