"""The kinds of faults, each a short script on a :class:`Lab`: start, strike at a seeded moment, see it end, go on.

Moments are steps of metrics.jsonl or files that appear, never times alone: a process is frozen (SIGSTOP), it is looked
at where it stands, and only then killed, so that "during a save" is during a save on any machine.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fault_lab import EXIT_S, SAVED_EVERY, STEPS, VALIDATED_EVERY, Lab, Launch, Process, Violation, small_disk


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        setups: the worlds that it strikes, in turn.
        weight: its share of a campaign.
        needs_mount: whether it mounts a file system (see ``may_mount``).
    """

    play: Callable[[Lab, random.Random], None]
    setups: tuple[str, ...]
    weight: int
    needs_mount: bool


KINDS: dict[str, Kind] = {}


def kind(*setups: str, weight: int = 2, needs_mount: bool = False):
    """Register a kind under its function's name."""

    def register(play):
        KINDS[play.__name__.replace("_", "-")] = Kind(play, setups, weight, needs_mount)
        return play

    return register


# --------------------------------------------------------------------------- words of cases


def some_rank(lab: Lab, rng: random.Random) -> int:
    return rng.randrange(lab.setup.processes)


def reach(lab: Lab, rng: random.Random, last: int = STEPS - 2) -> Launch:
    """A start that has come to some step, and a bit further."""
    launch, step = lab.start(), rng.randint(1, last)
    launch.wait_for_step(step)
    time.sleep(rng.uniform(0, 0.05))
    return launch


def kill(lab: Lab, launch: Launch, *processes: Process) -> float:
    """SIGKILL them all at once; returns when."""
    where = "before its folder" if not lab.folder.exists() else f"at step {lab.steps_done()}"
    for process in processes:
        launch.signal(process, signal.SIGKILL)
    ranks = ", ".join(f"rank {p.rank}" for p in processes if p.rank is not None)
    lab.note(f"kill -9 of {ranks or 'a loader'} {where}")
    return time.monotonic()


def names(lab: Lab, rank: int) -> tuple[str, ...]:
    """What is said of a rank that was killed, by others or by the launcher; nobody is left to say it of a lone process.

    Of one that is killed before it has read its configuration nobody knows more than that it did not come.
    """
    if lab.setup.processes == 1:
        return ()
    by_others = rf"rank {rank} \(host [^\n]*ended without a word|processes did not come within [^\n]*: rank {rank}\b"
    if rank == 0:
        by_others += "|see whether rank 0's process runs"
    # A launcher's table, where it was the first to notice.
    by_launcher = rf"rank +: {rank} [^\n]*\n +exitcode +: -9"
    return (f"{by_others}|{by_launcher}",)


def names_silent(rank: int) -> str:
    """What the others say of a rank that stands still."""
    return rf"no word from rank {rank} \(host"


def freeze_when(launch: Launch, rank: int, condition: Callable[[], bool], what: str) -> Process | None:
    """Freeze a rank at a moment at which ``condition`` holds, also while it stands still; None if it never came."""
    process = launch.trainer(rank)
    while True:
        try:
            launch.wait(condition, what, poll_s=0.0003)
        except Violation:
            if all(code == 0 for code in launch.codes):
                return None  # it finished: the moment was too short to be seen
            raise
        if not launch.freeze(process):
            return None
        if condition():
            return process
        launch.signal(process, signal.SIGCONT)


def too_late(lab: Lab, launch: Launch, what: str) -> None:
    lab.note(f"no {what} was caught")
    lab.finishes(launch)


# --------------------------------------------------------------------------- kill -9


@kind("ddp", "plain", "zero2", "images", "plain", "single", weight=6)
def kill_rank(lab: Lab, rng: random.Random) -> None:
    """One rank, at any step."""
    launch, rank = reach(lab, rng), some_rank(lab, rng)
    struck = kill(lab, launch, launch.trainer(rank))
    lab.dies(launch, struck, *names(lab, rank))
    lab.resumes()


@kind("plain", "zero2", "single", weight=2)
def kill_all(lab: Lab, rng: random.Random) -> None:
    """Everything at once, launcher too: the power fails."""
    launch = reach(lab, rng)
    struck = kill(lab, launch, *reversed(launch.processes()))  # ranks before the launcher, which would end them itself
    lab.dies(launch, struck)
    lab.resumes()


@kind("ddp", "zero2", weight=2)
def kill_launcher(lab: Lab, rng: random.Random) -> None:
    """The launcher alone, whose ranks have nobody left who would end them; or SIGUSR1 to it, which ends it too."""
    launch, number = reach(lab, rng, STEPS // 2), rng.choice((signal.SIGKILL, signal.SIGUSR1))
    struck = time.monotonic()
    os.kill(launch.launchers[0].pid, number)
    lab.note(f"{number.name} to the launcher at step {lab.steps_done()}")
    lab.dies(launch, struck, "everything is saved")
    lab.resumes(at_most_lost=0)


@kind("nodes", weight=4)
def kill_node(lab: Lab, rng: random.Random) -> None:
    """All processes of one machine of two, with its launcher."""
    launch, node = reach(lab, rng), rng.randrange(2)
    struck = kill(lab, launch, *[p for p in launch.processes() if p.node == node])
    lab.dies(launch, struck, *names(lab, node))
    lab.resumes()


@kind("plain", "ddp", "zero2", "single", weight=4)
def kill_in_start(lab: Lab, rng: random.Random) -> None:
    """A rank on its way to the first step: imports, the meeting of the ranks, the building of the network."""
    launch, rank = lab.start(), some_rank(lab, rng)
    process = launch.trainer(rank)
    on_the_way(lab, launch, rng)
    struck = kill(lab, launch, process)
    lab.dies(launch, struck, *names(lab, rank))
    lab.resumes()


def on_the_way(lab: Lab, launch: Launch, rng: random.Random) -> None:
    """Wait for a place between the start of the processes and the first step."""
    place = rng.choice((None, None, "lock", "config.yaml"))
    if place is None:  # imports
        time.sleep(rng.uniform(0, 3))
    else:  # the ranks have met; all is built
        launch.wait((lab.folder / place).exists, place)
        time.sleep(rng.uniform(0, 0.3))
    lab.note("in imports" if place is None else f"soon after there was {place}")


@kind("nodes", weight=2)
def kill_node_in_start(lab: Lab, rng: random.Random) -> None:
    """A machine, before or while the ranks meet."""
    launch, node = lab.start(), rng.randrange(2)
    launch.trainer(node)
    on_the_way(lab, launch, rng)
    struck = kill(lab, launch, *[p for p in launch.processes() if p.node == node])
    lab.dies(launch, struck, *names(lab, node))
    lab.resumes()


@kind("plain", "zero2", "ddp", "single", weight=4)
def kill_writer_in_save(lab: Lab, rng: random.Random) -> None:
    """Rank 0, while a checkpoint is half written."""
    launch = reach(lab, rng, STEPS - SAVED_EVERY - 2)
    process = freeze_when(launch, 0, lambda: half_written(lab), "a checkpoint in writing")
    if process is None:
        return too_late(lab, launch, "checkpoint in writing")
    lab.note(f"{half_written(lab)[0].name.split('.writing')[0]} half written")
    struck = kill(lab, launch, process)
    lab.dies(launch, struck, *names(lab, 0))
    lab.resumes()
    if half_written(lab):
        raise Violation("half-written checkpoints were left behind")


@kind("ddp", "plain", "zero2", weight=3)
def kill_other_in_save(lab: Lab, rng: random.Random) -> None:
    """A rank that does not write, while rank 0 does."""
    launch = reach(lab, rng, STEPS - SAVED_EVERY - 2)
    process = freeze_when(launch, 0, lambda: half_written(lab), "a checkpoint in writing")
    if process is None:
        return too_late(lab, launch, "checkpoint in writing")
    struck = kill(lab, launch, launch.trainer(1))
    launch.signal(process, signal.SIGCONT)
    lab.dies(launch, struck, *names(lab, 1))
    lab.resumes()


def half_written(lab: Lab) -> list[Path]:
    return list(lab.checkpoints.glob(".step-*.writing*"))


@kind("plain", "zero2", "ddp", weight=3)
def kill_in_validation(lab: Lab, rng: random.Random) -> None:
    """A rank, while the learner is validated."""
    launch, rank = reach(lab, rng, STEPS - VALIDATED_EVERY), some_rank(lab, rng)

    def validating() -> bool:
        due = lab.steps_done()
        return due > 0 and due % VALIDATED_EVERY == 0 and saved(lab, due) and not validated(lab, due)

    time.sleep(rng.uniform(0, 0.1))
    process = freeze_when(launch, rank, validating, "a validation")
    if process is None:
        return too_late(lab, launch, "validation")
    struck = kill(lab, launch, process)
    lab.dies(launch, struck, *names(lab, rank))
    lab.resumes(at_most_lost=0)


@kind("ddp", "plain", "single", weight=3)
def kill_in_test(lab: Lab, rng: random.Random) -> None:
    """A rank, during the final test or the export."""
    launch, rank = lab.start(), some_rank(lab, rng)
    launch.wait(lambda: validated(lab, STEPS), "the last validation")
    time.sleep(rng.uniform(0, 0.5))
    process = freeze_when(launch, rank, lambda: True, "the test")
    if process is None:
        return too_late(lab, launch, "final test")
    lab.note("after the test, before the export" if (lab.folder / "eval.json").exists() else "in the test")
    struck = kill(lab, launch, process)
    lab.dies(launch, struck, *names(lab, rank))
    lab.resumes(at_most_lost=0)


def saved(lab: Lab, step: int) -> bool:
    return (lab.checkpoints / f"step-{step:08d}.safetensors").exists()


def validated(lab: Lab, step: int) -> bool:
    with suppress(OSError):
        return f'"step": {step},' in (lab.folder / "validation.jsonl").read_text()
    return False


@kind("images", weight=2)
def kill_loader(lab: Lab, rng: random.Random) -> None:
    """A process that prepares episodes ahead for a rank."""
    launch, rank = reach(lab, rng, STEPS // 2), some_rank(lab, rng)
    trainer = launch.trainer(rank)
    helpers = [p for p in launch.processes() if p.rank is None and p.parent == trainer.pid]
    if not helpers:
        raise Violation("no process prepares episodes ahead")
    struck = kill(lab, launch, rng.choice(helpers))
    lab.note(f"of rank {rank}")
    lab.dies(launch, struck, r"worker.* (killed|exited)")
    lab.resumes()


@kind("elastic", weight=3)
def kill_rank_restarted_in_place(lab: Lab, rng: random.Random) -> None:
    """The launcher starts the ranks again by itself (--max_restarts), once or twice."""
    launch = lab.start()
    for step in sorted(rng.sample(range(1, STEPS - 2), rng.randint(1, 2))):
        launch.wait_for_step(step)
        rank = some_rank(lab, rng)
        kill(lab, launch, launch.trainer(rank))
        killed = lab.steps_done()
        # Back in training: the curve was cut to the checkpoint, or has gone on.
        launch.wait(lambda n=killed: lab.steps_done() != n or n % SAVED_EVERY == 0, "the restart in place")
    lab.finishes(launch)


# --------------------------------------------------------------------------- signals and hanging


@kind("ddp", "zero2", "plain", "nodes", "single", "elastic", weight=6)
def signal_storm(lab: Lab, rng: random.Random) -> None:
    """SIGTERM and SIGUSR1 to ranks and launchers, many, in any order, until everything has ended."""
    launch = reach(lab, rng)
    struck, sent = time.monotonic(), 0
    for _ in range(rng.randint(5, 40)):
        processes = [p for p in launch.processes() if p.rank is not None or p.pid in {x.pid for x in launch.launchers}]
        if not processes:
            break
        process = rng.choice(processes)
        # The launcher dies of SIGUSR1.
        number = rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1))
        launch.signal(process, number)
        sent += 1
        time.sleep(rng.choice((0, 0, 0.002, 0.02, 0.1)))
    lab.note(f"{sent} signals from step {lab.steps_done()} on")
    if not launch.gone(EXIT_S):
        lab.dies(launch, struck)  # says what is left
    if finished(lab):  # too late: all was done when the first one came
        return lab.finishes(launch)
    if lab.setup.restarts:  # under a launcher that restarts, a stopped run leaves as a success
        lab.exit_s.append(time.monotonic() - struck)
        if "everything is saved" not in launch.output:
            raise Violation(f"nobody said that everything is saved:\n{launch.tail()}")
    else:
        lab.dies(launch, struck, "everything is saved")
    lab.resumes(at_most_lost=0)


def finished(lab: Lab) -> bool:
    return (lab.folder / "eval.json").exists() and any((lab.folder / "export").glob("*.safetensors"))


@kind("plain", "zero2", "ddp", weight=3)
def hang_rank(lab: Lab, rng: random.Random) -> None:
    """A rank stands still (SIGSTOP) and stays so."""
    launch, rank = reach(lab, rng), some_rank(lab, rng)
    process = launch.trainer(rank)
    if not launch.freeze(process):
        return too_late(lab, launch, "training")
    lab.note(f"rank {rank} stands still from step {lab.steps_done()} on")
    lab.dies(launch, time.monotonic(), names_silent(rank))
    lab.resumes()


@kind("nodes", weight=2)
def hang_node(lab: Lab, rng: random.Random) -> None:
    """All of a machine stands still; the others end. It wakes up later, and must end too and write nothing."""
    launch, node = reach(lab, rng), rng.randrange(2)
    frozen = [p for p in launch.processes() if p.node == node]
    for process in frozen:
        launch.signal(process, signal.SIGSTOP)
    struck = time.monotonic()
    lab.note(f"node {node} stands still from step {lab.steps_done()} on")
    pids = {p.pid for p in frozen}
    while [p for p in launch.processes() if p.pid not in pids]:
        if time.monotonic() - struck > EXIT_S:
            raise Violation(f"{EXIT_S:.0f} s after node {node} stood still the other is there:\n{launch.tail()}")
        time.sleep(0.05)
    lab.exit_s.append(time.monotonic() - struck)
    for process in frozen:
        launch.signal(process, signal.SIGCONT)
    lab.dies(launch, time.monotonic(), names_silent(node))
    lab.resumes()


# --------------------------------------------------------------------------- the file system


@kind("plain", "single", "zero2", weight=3, needs_mount=True)
def disk_full(lab: Lab, rng: random.Random) -> None:
    """The file system is full at some moment; a start on it is refused; space is made, and the run goes on."""
    with small_disk(lab, 16) as disk:
        launch = reach(lab, rng, STEPS - 2 * SAVED_EVERY)
        ballast = disk / "ballast"
        left = rng.choice((0, 0, 4, 40)) * 1024
        struck = time.monotonic()
        with open(ballast, "wb", buffering=0) as file:
            with suppress(OSError):
                while True:
                    file.write(bytes(2**14))
            with suppress(OSError):
                while True:
                    file.write(bytes(512))
            file.truncate(max(0, file.tell() - left))
        lab.note(f"full but for {left // 1024} KiB at step {lab.steps_done()}")
        lab.dies(launch, struck, "No space left on device")
        lab.refuses(lab.start(), "No space left on device")
        ballast.unlink()
        lab.resumes(at_most_lost=2 * SAVED_EVERY)


@kind("plain", "single", weight=2)
def file_too_large(lab: Lab, rng: random.Random) -> None:
    """The file system takes no file above some size (a quota): rank 0 finds it out."""
    launch = reach(lab, rng, STEPS - 2 * SAVED_EVERY)
    limit = rng.choice((8_000, 30_000, 100_000))
    struck = time.monotonic()
    subprocess.run(["prlimit", "--pid", str(launch.trainer(0).pid), f"--fsize={limit}:{limit}"], check=True)
    lab.note(f"files up to {limit} bytes from step {lab.steps_done()} on")
    lab.dies(launch, struck, "File too large")
    lab.resumes()


@kind("plain", "ddp", weight=2, needs_mount=True)
def checkpoints_read_only(lab: Lab, rng: random.Random) -> None:
    """The checkpoint folder turns read-only under the run."""
    launch = lab.start()
    launch.wait_for_step(rng.randint(SAVED_EVERY + 1, STEPS - 2 * SAVED_EVERY))
    place = str(lab.checkpoints)
    struck = time.monotonic()
    subprocess.run(["mount", "--bind", place, place], check=True)
    lab.at_the_end(lambda: subprocess.run(["umount", "-l", place], check=False, capture_output=True))
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    lab.note(f"read-only from step {lab.steps_done()} on")
    lab.dies(launch, struck, "Read-only file system")
    subprocess.run(["umount", place], check=True)
    lab.resumes()


# --------------------------------------------------------------------------- damage between two starts


def killed_somewhere(lab: Lab, rng: random.Random) -> list[Path]:
    """A run that was killed with at least two checkpoints; returns them, newest first."""
    launch = lab.start()
    launch.wait_for_step(rng.randint(2 * SAVED_EVERY + 1, STEPS - 2))
    struck = kill(lab, launch, *reversed(launch.processes()))
    lab.dies(launch, struck)
    return sorted(lab.checkpoints.glob("step-*.safetensors"), reverse=True)


@kind("plain", "single", "zero2", weight=3)
def truncated_checkpoint(lab: Lab, rng: random.Random) -> None:
    """The newest one lost its end (or all of itself)."""
    newest = killed_somewhere(lab, rng)[0]
    size = newest.stat().st_size
    left = rng.choice((0, 4, rng.randrange(size), size - 1))
    os.truncate(newest, left)
    lab.note(f"{newest.name} cut to {left} of {size} bytes")
    lab.resumes(at_most_lost=2 * SAVED_EVERY, says=(f"{newest.name}.* damaged",))


@kind("single", "plain", "zero2", weight=3)
def flipped_bit(lab: Lab, rng: random.Random) -> None:
    """One bit of the newest one, anywhere: header, metadata, tensors."""
    newest = killed_somewhere(lab, rng)[0]
    content = bytearray(newest.read_bytes())
    at = rng.choice((rng.randrange(len(content)), rng.randrange(2000)))
    content[at] ^= 1 << rng.randrange(8)
    newest.write_bytes(content)
    lab.note(f"a bit of byte {at} of {newest.name} ({len(content)} bytes)")
    lab.resumes(at_most_lost=2 * SAVED_EVERY, says=(f"{newest.name}.* damaged",))


@kind("plain", "single", weight=2)
def missing_checkpoint(lab: Lab, rng: random.Random) -> None:
    """The newest one is gone, or all are."""
    found = killed_somewhere(lab, rng)
    gone = found if rng.random() < 0.5 else found[:1]
    for path in gone:
        path.unlink()
    lab.note(f"{len(gone)} of {len(found)} checkpoints removed")
    lab.resumes(at_most_lost=STEPS if gone is found else 2 * SAVED_EVERY)


@kind("single", "plain", weight=2)
def all_checkpoints_damaged(lab: Lab, rng: random.Random) -> None:
    """Nothing good is left: the run refuses to begin anew over it; one is put back, and it goes on."""
    found = killed_somewhere(lab, rng)
    contents = {path: path.read_bytes() for path in found}
    for path, content in contents.items():
        path.write_bytes(content[: rng.randrange(len(content))])
    lab.note(f"{len(found)} checkpoints cut")
    lab.refuses(lab.start(), "no checkpoint in .* is whole")
    back = rng.choice(found[:2])
    back.write_bytes(contents[back])
    lab.note(f"{back.name} put back")
    lab.resumes(at_most_lost=2 * SAVED_EVERY)


@kind("plain", "single", weight=2)
def torn_records(lab: Lab, rng: random.Random) -> None:
    """Half lines at the ends of the records, and rubbish in the small files: what a power cut leaves."""
    killed_somewhere(lab, rng)
    for name in ("metrics.jsonl", "validation.jsonl", "sessions.jsonl"):
        path = lab.folder / name
        if path.exists():
            content = path.read_bytes()
            path.write_bytes(content + content[: rng.randint(1, 40)])
    for name in ("status.json", "lock"):
        (lab.folder / name).write_bytes(rng.choice((b"", b"\0" * 100, b'{"state": "run')))
    lab.note("records torn, status and lock unreadable")
    lab.resumes()


# --------------------------------------------------------------------------- the data


@kind("images", weight=3)
def shard_gone(lab: Lab, rng: random.Random) -> None:
    """Half of the training shards disappear; a start without them is refused; they are put back.

    A run whose processes hold all that they still need open goes on, as if nothing had happened.
    """
    launch = reach(lab, rng, 2)  # soon: what a process has read of once it keeps open
    shards = sorted(lab.data.glob("train-*.tar"))
    away = rng.sample(shards, len(shards) // 2)
    struck = time.monotonic()
    for shard in away:
        shard.rename(shard.with_suffix(".away"))
    lab.note(f"{len(away)} of {len(shards)} shards gone at step {lab.steps_done()}")
    if launch.gone(EXIT_S) and not any(launch.codes):
        lab.note("all that was needed of them was open")
        return lab.finishes(launch)
    lab.dies(launch, struck, r"train-\d+\.tar.*(cannot be read|No such file|missing)")
    lab.refuses(lab.start(), r"train-\d+\.tar")
    for shard in away:
        shard.with_suffix(".away").rename(shard)
    lab.resumes()


@kind("images", weight=2)
def shard_damaged(lab: Lab, rng: random.Random) -> None:
    """A training shard is cut off, or has rubbish in it, while the run reads it; a good copy is put back."""
    launch = reach(lab, rng, STEPS // 4)
    shards = sorted(lab.data.glob("train-*.tar"))
    contents = {shard: shard.read_bytes() for shard in rng.sample(shards, len(shards) // 2)}
    struck, cut = time.monotonic(), rng.random() < 0.5
    for shard, content in contents.items():
        if cut:
            os.truncate(shard, len(content) // 3)
        else:
            with open(shard, "r+b") as file:
                file.write(rng.randbytes(len(content)))
    lab.note(f"{len(contents)} of {len(shards)} shards {'cut' if cut else 'overwritten'} at step {lab.steps_done()}")
    lab.dies(launch, struck, r"train-\d+\.tar")
    for shard, content in contents.items():
        shard.write_bytes(content)
    lab.resumes()


# --------------------------------------------------------------------------- two trainers


@kind("plain", "single", weight=2)
def second_trainer(lab: Lab, rng: random.Random) -> None:
    """The same command a second time, while the first stands still, holds the folder, and goes on later."""
    launch = reach(lab, rng)
    frozen = launch.processes()
    for process in frozen:
        launch.signal(process, signal.SIGSTOP)
    lab.note(f"a second trainer at step {lab.steps_done()}")
    lab.refuses(lab.start(), "another process trains in run.dir")
    for process in frozen:
        launch.signal(process, signal.SIGCONT)
    lab.finishes(launch)


@kind("plain", "single", weight=2)
def two_at_once(lab: Lab, rng: random.Random) -> None:
    """The same command twice, all but at the same time: one runs, the other is refused."""
    launches = [lab.start()]
    time.sleep(rng.uniform(0, 0.3))
    launches.append(lab.start())
    began = launches[-1].began
    while all(None in x.codes for x in launches):
        if time.monotonic() - began > 2 * EXIT_S:
            raise Violation("both are at work")
        time.sleep(0.02)
    loser = next(x for x in launches if None not in x.codes)
    (winner,) = (x for x in launches if x is not loser)
    lab.refuses(loser, "another process trains in run.dir")
    lab.note(f"the {'first' if winner is launches[0] else 'second'} won")
    lab.finishes(winner)
    if lab.starts != 1:
        raise Violation(f"{lab.starts} starts were recorded")
