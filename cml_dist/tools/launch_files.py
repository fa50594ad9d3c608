"""The files for Accelerate and SLURM that come with the package: where they are, and a run checked against one."""

from __future__ import annotations

import shutil
from pathlib import Path

from cml_dist.config.launcher import launcher_variables
from cml_dist.config.plan import make_plan
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError
from cml_dist.run.folder import RunFolder

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "launch", _PACKAGE.parent / "launch")
"""Installed (setup.py puts the files there), or in a checkout, also an editable one."""


def launch_folder() -> Path:
    """The folder that holds ``accelerate/*.yaml`` and ``slurm/*``."""
    return next(place for place in _PLACES if (place / "slurm").is_dir())


def accelerate_file(asked: str, option: str, may_be_path: bool = False) -> Path:
    """The shipped Accelerate file of that name, or one by its path; ConfigError names ``option`` if neither."""
    folder = launch_folder() / "accelerate"
    files = sorted(path.stem for path in folder.glob("*.yaml"))
    if asked in files:
        return folder / f"{asked}.yaml"
    if may_be_path and Path(asked).is_file():
        return Path(asked)
    further = ", or the path of an Accelerate file" if may_be_path else ""
    raise ConfigError(f"{option} is {asked}", f"use one of {', '.join(files)}{further}")


def write_launch_files(folder: Path) -> list[Path]:
    """Write all of them into a folder, to be edited; returns their paths there.

    Raises:
        ConfigError: one of them is there already, and none is written.
    """
    shipped = [path for kind in ("accelerate", "slurm") for path in sorted((launch_folder() / kind).iterdir())]
    targets = [folder / path.parent.name / path.name for path in shipped]
    if there := [str(path) for path in targets if path.exists()]:
        raise ConfigError(f"{there[0]} is there already, and would be overwritten", "name another folder, or remove it")
    for path, target in zip(shipped, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return targets


def check_run(config: RunConfig, processes: int, file: Path, asked: str = "") -> None:
    """What a run would be refused for once its processes run, under an Accelerate file; ``asked``: them in words.

    Raises:
        ConfigError: something contradicts the run.
        CheckpointError: its folder holds a run of another configuration.
    """
    if config.parallel.processes not in (None, processes):
        what = f"parallel.processes is {config.parallel.processes}, but {asked or processes} processes were asked for"
        raise ConfigError(what, "drop parallel.processes, or ask for as many")
    make_plan(config, processes, launcher_variables(file))
    folder = RunFolder(config.run.dir)
    if folder.exists:
        folder.check_resumable(config)
