"""What is done with a run after training, by its configuration (:func:`run_config`): test it again, export it again."""

from __future__ import annotations

import os

from cml_dist.config.plan import make_plan
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.allocator import memory_explained
from cml_dist.distributed.world import joined_world, set_arithmetic
from cml_dist.run.assemble import assemble
from cml_dist.run.export import export_run
from cml_dist.run.folder import RunFolder
from cml_dist.run.report import score_run
from cml_dist.telemetry.console import Console, preparing


def evaluate_run(config: RunConfig, which: str, console: Console) -> dict:
    """Test a run's checkpoint and write its figures (:func:`score_run`). Collective: all ranks."""
    with joined_world(config) as world, memory_explained(world.device):
        set_arithmetic(config, world)
        with preparing(console) as progress:
            parts = assemble(config, make_plan(config, world.size, os.environ), world, progress, training=False)
        return score_run(config, parts, RunFolder(config.run.dir), world, console, which)


def export_again(config: RunConfig, which: str, to: str | None, console: Console) -> None:
    """Export a run's checkpoint. Collective: all ranks (rank 0 writes)."""
    with joined_world(config) as world:
        with preparing(console) as progress:
            parts = assemble(config, make_plan(config, world.size, os.environ), world, progress, training=False)

        def write() -> None:
            made = export_run(config, parts, RunFolder(config.run.dir), console, which, to)
            console.note(f"Exported model: {made}")

        world.heartbeat.beat("the export")
        world.run_on_main(write)
