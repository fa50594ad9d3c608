"""What is done with a run after training: test it again, export it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cml_dist.config.load import merge, parse_config
from cml_dist.config.plan import make_plan
from cml_dist.config.schema import RunConfig
from cml_dist.parallel.world import joined_world, set_arithmetic
from cml_dist.run.assemble import assemble
from cml_dist.run.export import export_run
from cml_dist.run.folder import RunFolder
from cml_dist.run.report import score_run
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.preparing import preparing


def run_config(run_dir: str | Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration of the run in ``run_dir`` with overrides, which may change how it is tested.

    Raises:
        CheckpointError: no run lives there. ConfigError: an override cannot be used.
    """
    data = RunFolder(run_dir).read_config().model_dump(mode="json")
    # The folder may have been moved, and a test may use another world than training did.
    data["run"]["dir"] = str(run_dir)
    data["parallel"] |= {"processes": None, "strategy": "auto", "offload": "auto", "deepspeed": None}
    return parse_config(merge(data, overrides), source=f"{run_dir}/config.yaml")


def evaluate_run(run_dir: str, overrides: Sequence[str], which: str, console: Console) -> dict:
    """Test a run's checkpoint and write its figures (:func:`score_run`). Collective: all ranks."""
    config = run_config(run_dir, overrides)
    with joined_world(config) as world:
        set_arithmetic(config, world)
        with preparing(console) as progress:
            parts = assemble(config, make_plan(config, world.size), world, progress, training=False)
        return score_run(config, parts.plan, parts, RunFolder(run_dir), world, console, which)


def export_again(run_dir: str, overrides: Sequence[str], which: str, to: str | None, console: Console) -> None:
    """Export a run's checkpoint. Collective: all ranks (rank 0 writes)."""
    config = run_config(run_dir, overrides)
    with joined_world(config) as world:
        with preparing(console) as progress:
            parts = assemble(config, make_plan(config, world.size), world, progress, training=False)

        def write() -> None:
            world.watch.beat("the export")
            if world.is_main:
                made = export_run(config, parts, RunFolder(run_dir), console, which, to)
                console.note(f"Exported model: {made}")

        world.together(write)
