"""What is done with a run after training, by its configuration (:func:`run_config`): test it again, export it again."""

from __future__ import annotations

from cml_dist.config.schema import RunConfig
from cml_dist.distributed.gpu_memory import memory_explained
from cml_dist.distributed.world import joined_world
from cml_dist.run.assemble import assemble
from cml_dist.run.export import export_run
from cml_dist.run.report import score_run
from cml_dist.telemetry.console import Console


def evaluate_run(config: RunConfig, which: str, console: Console) -> dict:
    """Test a run's checkpoint and write its figures (:func:`score_run`). Collective: all ranks."""
    with joined_world(config) as world, memory_explained(world.device):
        return score_run(config, assemble(config, world, console, training=False), world, console, which)


def export_again(config: RunConfig, which: str, to: str | None, console: Console) -> None:
    """Export a run's checkpoint. Collective: all ranks (rank 0 writes)."""
    with joined_world(config) as world:
        parts = assemble(config, world, console, training=False)
        world.heartbeat.beat("the export")
        world.run_on_main(lambda: export_run(config, parts, console, which, to))
