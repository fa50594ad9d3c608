"""``cml-dist sweep``: many runs of one configuration; what is printed before and after."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.errors import ConfigError
from cml_dist.run.interrupts import STOPPED_BY_SCHEDULER

if TYPE_CHECKING:
    from cml_dist.config.sweep import Sweep
    from cml_dist.experiments.pool import Place
    from cml_dist.experiments.sweep import Job
    from cml_dist.telemetry.console import Console

WHAT_NEXT = {
    "finished": "finished", "running": "running", "queued": "in the queue", "stopped": "to go on with",
    "dead": "to go on with", "failed": "to try again", "waiting": "to begin", "broken": "broken",
}  # fmt: skip
"""By a run's state."""


def sweep(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.config.sweep import MANY, read_sweep

    asked = read_sweep(args.sweep)
    if asked.count() > MANY and not args.yes:
        raise ConfigError(f"{args.sweep} makes {asked.count():,} runs", "add --yes if all of them are meant")
    return carry_out([asked], args, console, f"Sweep {asked.dir}", args.code)


def carry_out(
    sweeps: Sequence[Sweep], args: argparse.Namespace, console: Console, title: str, code: Sequence[str] = ()
) -> int:
    """Train what is missing of sweeps, here or as an array of SLURM each, as the options say; returns the exit code.

    Args:
        args: ``at_once``, ``plan``, ``slurm``, and the options of :func:`cml_dist.tools.slurm.prepare`.
        code: of a user's own, which the sweeps may name.
    """
    from cml_dist.experiments.pool import work_off
    from cml_dist.experiments.sweep import estimated, survey, write_record
    from cml_dist.tools.slurm import follow, prepare, queued, submit

    if args.slurm != bool(args.time) or (args.dry_run and not args.slurm):
        raise ConfigError("--slurm and --time go together", "give both, or neither of them nor --dry-run to train here")
    surveyed = [estimated(survey(asked, code, console.warn)) for asked in sweeps]
    for asked, jobs in zip(sweeps, surveyed, strict=True):
        there = queued(Path(asked.dir)) if args.slurm else ()
        jobs[:] = [replace(job, state="queued") if job.is_due and job.name in there else job for job in jobs]
    source, at_once = "from the runs that are there", args.at_once
    if args.dry_run:
        if len(due := [[job.words for job in jobs if job.is_due] for jobs in surveyed]) > 1:
            raise ConfigError(
                f"--dry-run prints one script, and there are {len(due)}", "name rows of one recipe: --rows"
            )
        print(prepare(args, console.warn, due[0]).script if due[0] else "", end="")
        return 0
    facts = {"base": ", ".join(asked.base for asked in sweeps), "runs": _counted([*chain(*surveyed)])}
    if not args.slurm:
        where = places_for([*chain(*surveyed)], at_once, console)
        at_once = len(where)
        facts["at once"] = f"{at_once}, each on {where[0]}"
        for jobs in surveyed:
            jobs[:], measured = timed(jobs, where[0], console)
            source = measured or source
    jobs = [*chain(*surveyed)]
    due = [job for job in jobs if job.is_due]
    console.header(title, facts | _times(due, source, at_once))
    for job in jobs:
        if job.state == "broken":
            console.warn(f"Left out: {job.name}: {job.reason}")
        elif job.state == "running":
            console.note(f"Left alone: {job.name} is running")
    if args.plan:
        _table(jobs, console)
        return 0
    for asked in sweeps:
        write_record(asked)
    if args.slurm:
        for words in filter(None, ([job.words for job in jobs if job.is_due] for jobs in surveyed)):
            batch = prepare(args, console.warn, words)
            for says, command in follow(batch, submit(batch)):
                console.command(says, command)
        return 0
    ended = work_off(due, where, console)
    now = [job for asked in sweeps for job in survey(asked, code)]
    console.note(f"{title.removeprefix('Sweep ')}: {_counted(now)}")
    if ended > 1:
        console.note("The same command goes on")
    elif any(job.state == "broken" for job in now):
        return 1
    return ended or STOPPED_BY_SCHEDULER * any(job.state != "finished" for job in now)


def places_for(jobs: Sequence[Job], at_once: int | None, console: Console) -> list[Place]:
    """Where so many runs at a time have their GPUs and cores; None: as many as the GPUs are enough for."""
    from cml_dist.experiments.pool import places, visible_gpus

    processes = max((job.processes for job in jobs), default=1)
    on_cpu = all(job.config.run.device == "cpu" for job in jobs)
    if not on_cpu:
        console.loading()
    gpus = [] if on_cpu else visible_gpus()
    return places(at_once or max(1, len(gpus) // processes), processes, gpus)


def timed(jobs: Sequence[Job], place: Place, console: Console) -> tuple[list[Job], str]:
    """The jobs of a sweep with seconds of a meta-step, measured where none is known, and then on which, in words."""
    from cml_dist.experiments.pool import measure
    from cml_dist.experiments.sweep import estimated

    jobs = estimated(jobs)
    first = next((job for job in jobs if job.is_due), None)
    if first is None or first.step_s is not None:
        return jobs, ""
    console.note(f"Measuring a meta-step of {first.name}")
    step_s = measure(first, place)
    known = [replace(job, step_s=step_s) if job is first else job for job in jobs]
    return estimated(known), f"measured on {first.name}"


def _counted(jobs: Sequence[Job]) -> str:
    counts = Counter(WHAT_NEXT[job.state] for job in jobs)
    found = ", ".join(f"{counts[word]} {word}" for word in dict.fromkeys(WHAT_NEXT.values()) if counts[word])
    return found if len(counts) == 1 else f"{len(jobs)}: {found}"


def _times(due: Sequence[Job], source: str, at_once: int | None) -> dict[str, str]:
    """How long each run that is due takes, and all of them."""
    from cml_dist.telemetry.text import duration, number

    if not due or any(job.step_s is None for job in due):
        return {"each": "nothing has been measured yet"} if due else {}
    lengths, steps = sorted(job.left_s for job in due), sorted(job.step_s for job in due)
    each, step = (
        " to ".join(dict.fromkeys((shown[0], shown[-1])))
        for shown in ([*map(duration, lengths)], [number(step_s, 2) for step_s in steps])
    )
    extra = "starting, validations and the test are extra"
    said = {"each": f"{each} of training ({step} s a meta-step, {source}); {extra}"}
    if at_once:
        said["all"] = f"{duration(sum(lengths) / min(at_once, len(due)))} of training"
    return said


def _table(jobs: Sequence[Job], console: Console) -> None:
    from cml_dist.telemetry.text import duration

    rows = [
        (job.name, WHAT_NEXT[job.state], job.step, job.config.train.steps, duration(job.left_s) if job.left_s else None)
        for job in jobs
    ]
    console.table("", ("run", "what", "step", "of", "left"), rows)
