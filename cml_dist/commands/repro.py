"""``cml-dist repro``: a table of the paper, trained here, beside what was published."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from cml_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cml_dist.config.repro import Row
    from cml_dist.experiments.repro import Collected
    from cml_dist.experiments.sweep import Job
    from cml_dist.telemetry.console import Console


def repro(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.config.load import load_config
    from cml_dist.config.repro import chosen, find_table, sweeps_of, tables
    from cml_dist.experiments.repro import blocked, check_apart, collect
    from cml_dist.experiments.sweep import survey
    from cml_dist.run.folder import NEUTRAL_KEYS

    if args.table is None:
        rows = [(name, find_table(name).about) for name in tables()]
        console.table("", ("table", "what"), rows)
        console.note("cml-dist repro TABLE --list has the rows of one")
        return 0
    table = find_table(args.table)
    rows, budget, seeds = chosen(table, args.rows), args.budget, args.seeds or table.seeds
    if not 0 < budget <= 1:
        raise ConfigError(f"--budget is {budget:g}", "give the fraction of training, above 0 and at most 1")
    how = (seeds, args.out, args.data, budget, args.overrides)
    configs = {
        name: load_config(sweep.base, sweep.runs()[0].overrides)
        for name, row in rows.items() if not row.absent for sweep in sweeps_of({name: row}, *how)
    }  # fmt: skip
    if split := next((name for name, config in configs.items() if config.all_splits), None):
        raise ConfigError(f"domain.split of {split} is all, and a row is of one split", "choose one: domain.split=0")
    if not args.dry_run:  # whose output is a script
        console.loading()
    check_apart(rows, configs)
    lacking, notes = blocked(rows, configs)
    runnable = {name: row for name, row in rows.items() if name not in lacking}
    sweeps = sweeps_of(runnable, *how)
    for reason in dict.fromkeys(lacking.values()):
        names = [name for name in lacking if lacking[name] == reason]
        console.warn(f"Cannot run {', '.join(names)}: {reason}")
    changed = [word for word in args.overrides if not word.startswith((*NEUTRAL_KEYS, "eval.untrained="))]
    title = table.title + f", at {budget:g} of the training" * (budget != 1) + ", with changed settings" * bool(changed)
    if budget != 1:
        notes.append(f"Trained for {budget:g} of the meta-steps (--budget): not what was published of whole trainings")
    if changed:
        notes.append(f"Changed on the command line: {' '.join(changed)}")
    code = [*args.code, *(word.partition("=")[2] for word in args.overrides)]  # which the command line names itself
    if args.list:
        _list(args, console, rows, [survey(sweep, code, console.warn) for sweep in sweeps], lacking, title, notes)
        return 0
    if not runnable:
        raise DataError(f"no row of {args.table} can run here", "see the warnings above")
    from cml_dist.commands.sweep import carry_out

    ended = carry_out(sweeps, args, console, title, code)
    if not args.dry_run:
        can_run = {name: config for name, config in configs.items() if name in runnable}
        jobs = chain(*(survey(sweep, code) for sweep in sweeps))
        _show(args, console, collect(title, rows, jobs, can_run, notes))
    return ended


def _list(
    args: argparse.Namespace,
    console: Console,
    rows: Mapping[str, Row],
    surveyed: Sequence[Sequence[Job]],
    lacking: Mapping[str, str],
    title: str,
    notes: Sequence[str],
) -> None:
    """The rows with hours, and where all of it is from."""
    from cml_dist.commands.sweep import places_for, timed
    from cml_dist.experiments.repro import listed, row_of

    where = places_for([*chain(*surveyed)], args.at_once, console)
    jobs: dict[str, list[Job]] = {}
    for each in surveyed:
        for job in timed(each, where[0], console)[0]:
            jobs.setdefault(row_of(job.run), []).append(job)
    console.table(title, *listed(rows, jobs, lacking)[1:], least=("baseline", "others"))
    said = {what: _said(rows, what) for what in ("sources", "quirks")}
    others = [(name, f"{one.score:.2f}", one.by) for name, row in rows.items() for one in row.reruns]
    for heading, columns, cells in (
        ("What others found", ("row", "score", "by"), others),
        ("Where settings are from", ("setting", "from", "rows"), said["sources"]),
        ("Quirks of the released code", ("quirk", "here", "rows"), said["quirks"]),
    ):
        if cells:
            console.table(heading, columns, cells)
    for note in notes:
        console.note(note)
    console.note("Times are of the meta-steps left, one run at a time; starting, validations and tests are extra")


def _said(rows: Mapping[str, Row], what: str) -> list[tuple[str, str, str]]:
    """Sources or quirks of rows, each once with the rows that it is of."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, row in rows.items():
        for pair in getattr(row, what).items():
            found.setdefault(pair, []).append(name)
    return [(*pair, "all" if len(names) == len(rows) else ", ".join(names)) for pair, names in found.items()]


def _show(args: argparse.Namespace, console: Console, found: Collected) -> None:
    from cml_dist.commands.compare import write_tables
    from cml_dist.experiments.repro import EXPLAINED, as_csv, tables

    made, notes = tables(found), [*found.notes, *EXPLAINED]
    for title, columns, rows in made:
        least = [name for name in ("slope", "s.d.", "others", "95 %") if name in columns]
        console.table(title, columns, rows, least=least)
    for note in notes:
        console.note(note)
    write_tables(args, console, as_csv(found), made, notes)
