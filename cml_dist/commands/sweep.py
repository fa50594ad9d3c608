"""``cml-dist sweep``: many runs of one configuration; what is printed before and after."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.errors import ConfigError
from cml_dist.run.interrupts import STOPPED_BY_SCHEDULER

if TYPE_CHECKING:
    from cml_dist.experiments.sweep import Job
    from cml_dist.telemetry.console import Console

WHAT_NEXT = {
    "finished": "finished", "running": "running", "queued": "in the queue", "stopped": "to go on with",
    "dead": "to go on with", "failed": "to try again", "waiting": "to begin", "broken": "broken",
}  # fmt: skip
"""By a run's state."""


def sweep(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.config.sweep import MANY, read_sweep
    from cml_dist.experiments.pool import measure, places, visible_gpus, work_off
    from cml_dist.experiments.sweep import estimated, survey, write_record
    from cml_dist.tools.slurm import follow, prepare, queued, submit

    asked = read_sweep(args.sweep)
    if asked.count() > MANY and not args.yes:
        raise ConfigError(f"{args.sweep} makes {asked.count():,} runs", "add --yes if all of them are meant")
    if args.slurm != bool(args.time) or (args.dry_run and not args.slurm):
        raise ConfigError("--slurm and --time go together", "give both, or neither of them nor --dry-run to train here")
    jobs = estimated(survey(asked, args.code, console.warn))
    there = queued(Path(asked.dir)) if args.slurm else ()
    jobs = [replace(job, state="queued") if job.is_due and job.name in there else job for job in jobs]
    due, source, at_once = [job for job in jobs if job.is_due], "from the runs that are there", args.at_once
    if args.dry_run:
        print(prepare(args, console.warn, [job.words for job in due]).script if due else "", end="")
        return 0
    facts = {"base": asked.base, "runs": _counted(jobs)}
    if not args.slurm:
        processes = max(job.processes for job in jobs)
        on_cpu = all(job.config.run.device == "cpu" for job in jobs)
        if not on_cpu:
            console.loading()
        gpus = [] if on_cpu else visible_gpus()
        at_once = at_once or max(1, len(gpus) // processes)
        where = places(at_once, processes, gpus)
        facts["at once"] = f"{at_once}, each on {where[0]}"
        if due and due[0].step_s is None:
            console.note(f"Measuring a meta-step of {due[0].name}")
            jobs = estimated([replace(job, step_s=measure(job, where[0])) if job is due[0] else job for job in jobs])
            due, source = [job for job in jobs if job.is_due], f"measured on {due[0].name}"
    console.header(f"Sweep {asked.dir}", facts | _times(due, source, at_once))
    for job in jobs:
        if job.state == "broken":
            console.warn(f"Left out: {job.name}: {job.reason}")
        elif job.state == "running":
            console.note(f"Left alone: {job.name} is running")
    if args.plan:
        _table(jobs, console)
        return 0
    write_record(asked)
    if args.slurm:
        if due:
            batch = prepare(args, console.warn, [job.words for job in due])
            for says, command in follow(batch, submit(batch)):
                console.command(says, command)
        return 0
    code = work_off(due, where, console)
    now = survey(asked, args.code)
    console.note(f"{asked.dir}: {_counted(now)}")
    if code > 1:
        console.note("The same command goes on")
    elif any(job.state == "broken" for job in now):
        return 1
    return code or STOPPED_BY_SCHEDULER * any(job.state != "finished" for job in now)


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
