"""``cml-dist analyse``: what meta-gradients, features and inner steps of runs look like, as pictures and numbers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cml_dist.experiments.analyse_figures import Group
    from cml_dist.telemetry.console import Console


def analyse(args: argparse.Namespace, console: Console) -> None:
    console.loading()
    from cml_dist.distributed.allocator import memory_explained
    from cml_dist.distributed.world import joined_world
    from cml_dist.experiments.analyse import choose_runs, measure_run
    from cml_dist.experiments.analyse_figures import Group
    from cml_dist.experiments.compare import find_runs

    # A pattern over the runs of a sweep also gives the logs that lie beside them.
    folders = find_runs(place for place in args.runs if not Path(place).is_file())
    variants, names, notes = choose_runs(folders, args.checkpoints, args.overrides, args.code)
    for note in notes:
        console.note(note)
    out, groups = Path(args.out), []
    with joined_world(variants[0][0].config) as world, memory_explained(world.device):
        for number, (name, runs) in enumerate(zip(names, variants, strict=True), start=1):
            found = tuple((run, measure_run(run, args.episodes, out, world, console)) for run in runs)
            groups.append(Group(number, name, found))
        world.heartbeat.beat("drawing the pictures")
        world.run_on_main(lambda: _write(groups, args.episodes, notes, out, console))


def _write(groups: Sequence[Group], episodes: int, notes: Sequence[str], out: Path, console: Console) -> None:
    import io

    import numpy as np

    from cml_dist.atomic import write_bytes, write_json
    from cml_dist.experiments.analyse_figures import draw, numbers, table

    made, arrays = io.BytesIO(), {}
    for group in groups:
        for run, found in group.runs:
            for step, one in found.items():
                arrays |= {f"{group.name}/seed={run.seed}/{step}/{k}": v for k, v in vars(one).items()}
    np.savez(made, **arrays)
    write_json(out / "analysis.json", numbers(groups, episodes, notes))
    write_bytes(out / "analysis.npz", made.getvalue())
    for picture in draw(groups):
        picture.write(out)
        console.note(f"Written: {out / picture.name}.png, .svg")
    console.table(*table(groups))
    console.note(f"Written: {out}/analysis.json, and analysis.npz with the value of every episode")
