"""``cml-dist scale``: a scaling study, from its plan to tables and pictures; and the processes of a cell."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cml_dist.atomic import write_json
from cml_dist.distributed.env import Launched, join_srun, launched
from cml_dist.errors import CmlError, ConfigError

if TYPE_CHECKING:
    from cml_dist.experiments.scale import Cell
    from cml_dist.experiments.scale_start import Start
    from cml_dist.telemetry.console import Console


def scale(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.experiments.scale import STUDY, parse_axes, plan_study, read_study

    if args.measure:
        return _measure(args, console)
    worlds, ahead = _numbers(args.worlds, "--worlds"), _numbers(args.project, "--project") if args.project else []
    if ahead and len(worlds) < 2:
        raise ConfigError(
            f"--project needs two measured worlds, but --worlds is {args.worlds}", "name two or more, e.g. --worlds 1,2"
        )
    if args.link is not None and not (ahead and args.link > 0):
        raise ConfigError(f"--link is {args.link:g}", "give Gbit/s above 0, together with --project")
    here, out = launched(), Path(args.out)
    axes = parse_axes(args.axes, args.backbones)
    from cml_dist.config.load import load_config

    base = load_config(args.config, args.overrides, console.warn, args.preset)
    console.loading()
    start, cores = _starter(args, base, here, worlds, (read_study(out) or {"record": {}})["record"].get("--cores"))
    kinds = ("strong", "weak") if args.scaling == "both" else (args.scaling,)
    asked = {"worlds": worlds, "axes": axes, "kinds": kinds, "steps": args.steps, "warm_up": args.warm_up}
    cells, record = plan_study(args.config, args.overrides, args.preset, out, **asked, cores=cores)
    _check_networks(cells)
    due = [cell for cell in cells if not cell.is_measured]
    if here.size > 1:
        names = start.agreed([cell.file.name for cell in due])
        due = [cell for cell in cells if cell.file.name in names]
    later = [cell for cell in due if 1 < here.size < cell.world]
    due = [cell for cell in due if cell not in later]
    facts = {
        "cells": f"{len(cells)}: {len(cells) - len(due) - len(later)} measured, {len(due)} to measure"
        + (f", {len(later)} of larger worlds than this launcher's" if later else ""),
        "each": f"{args.steps} meta-steps after {args.warm_up}, in fresh processes"
        + (f" on {cores} core{'s' * (cores > 1)} each" if cores else ""),
    }
    console.header(f"Scaling study {out}", facts)
    failed: dict[str, str] = {}
    from cml_dist.experiments.scale_start import run_cell

    if here.rank == 0:
        write_json(out / STUDY, {"cells": [], **(read_study(out) or {}), "record": record})
    with console.progress(f"{len(due)} cells", len(due)) as view:
        for number, cell in enumerate(due, start=1):
            began_s = time.monotonic()
            if why := run_cell(cell, start, here.rank == 0):
                failed[cell.name] = why
                console.warn(f"Failed: {cell.name}: {why}")
            else:
                console.note(f"Measured {cell.name} in {time.monotonic() - began_s:.0f} s")
            view.update(number)
    if here.size > 1:
        start.close()
    if here.rank > 0:
        return 0
    return _conclude(cells, ahead, args.link, record, failed, out, console)


def _measure(args: argparse.Namespace, console: Console) -> int:
    """Be one process of a cell."""
    os.environ.update(join_srun())
    from cml_dist.config.load import load_config
    from cml_dist.experiments.scale_cell import measure_cell

    config = load_config(args.config, args.overrides, console.warn, args.preset)
    measure_cell(config, args.warm_up, Path(args.measure), console)
    return 0


def _numbers(words: str, option: str) -> list[int]:
    try:
        found = sorted({int(word) for word in words.split(",")})
        if found[0] < 1:
            raise ValueError
        return found
    except ValueError:
        raise ConfigError(f"{option} is {words!r}", "give whole numbers from 1, e.g. 1,2,4") from None


def _starter(
    args: argparse.Namespace, base: Any, here: Launched, worlds: Sequence[int], before: int | None
) -> tuple[Start, int | None]:
    """What starts the cells, and cores of each process, where it is this command that deals them out.

    Args:
        before: cores of each process in the cells that are there: taken again where there are so many.
    """
    import torch

    from cml_dist.data.cores import usable_cores
    from cml_dist.experiments.scale_start import Beside, Here, Srun

    def share(processes: int) -> int:
        most = max(1, usable_cores() // processes)
        return before if before and before <= most else most

    if args.srun and ("SLURM_JOB_ID" not in os.environ or here.size > 1):
        raise ConfigError("--srun starts steps of a SLURM job, and this is none", "run it in a batch script or salloc")
    if args.srun:
        return Srun(args.cores), args.cores
    if here.size > 1:
        if args.cores:
            raise ConfigError(f"--cores is {args.cores}, but the launcher deals out the cores", "leave it out")
        beside = Beside(here)
        return beside, beside.agreed(share(here.local_size))
    gpus = 0 if base.run.device == "cpu" else torch.cuda.device_count()
    cores = args.cores or share(worlds[-1])
    needs = [(worlds[-1], gpus, "GPU")] * bool(gpus)
    needs += [(worlds[-1] * cores, usable_cores(), "core")] * (not gpus or args.cores is not None)
    for need, have, what in needs:
        if need > have:
            raise ConfigError(
                f"a world of {worlds[-1]} needs {need} {what}s, but this machine has {have} for it: processes that "
                "share one measure nothing",
                f"name smaller --worlds{', or fewer --cores' if args.cores else ''}; "
                "--project says what is to be expected of larger ones",
            )
    return Here(cores), cores


def _check_networks(cells: Sequence[Cell]) -> None:
    """Build each network without values: what cannot be is refused before the first measurement."""
    from cml_dist.data.set_shape import known_shape
    from cml_dist.memory.forecast import known_inputs, network_structure

    for cell in {cell.variant: cell for cell in cells}.values():
        config = known_shape(cell.config)
        network_structure(config, known_inputs(config))


def _conclude(
    cells: Sequence[Cell], ahead: Sequence[int], link: float | None, recorded: Mapping[str, Any],
    failed: Mapping[str, str], out: Path, console: Console,
) -> int:  # fmt: skip
    from cml_dist.experiments.scale import STUDY
    from cml_dist.experiments.scale_results import content, result_of

    results, left_out = [], dict(failed)
    for cell in cells:
        try:
            if cell.is_measured:
                results.append(result_of(cell, cell.measured()))
        except (CmlError, LookupError, TypeError, ValueError) as error:
            left_out[cell.name] = str(error) if isinstance(error, CmlError) else f"{cell.file} is damaged: {error!r}"
            console.warn(f"Left out: {left_out[cell.name]}")
    study = {"record": recorded, **content(results, ahead, link, left_out)}
    write_json(out / STUDY, study)
    if not results:
        return 1
    from cml_dist.experiments.scale_figures import draw_study
    from cml_dist.experiments.scale_shown import notes, tables

    for title, columns, rows, least in tables(study):
        console.table(title, columns, rows, least=least)
    for note in notes(study):
        console.note(note)
    for figure in (figures := [*draw_study(study)]):
        figure.write(out)
    console.note(f"Written: {out}/scale.json, and as .png and .svg {', '.join(figure.name for figure in figures)}")
    return 1 if left_out else 0
