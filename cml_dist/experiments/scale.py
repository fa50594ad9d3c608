"""A scaling study and its folder: the cells that are asked for, and those that are measured. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from cml_dist.config.load import load_config
from cml_dist.config.schema import RunConfig
from cml_dist.config.sweep import Run, Sweep
from cml_dist.errors import CheckpointError, ConfigError
from cml_dist.run.folder import same_everywhere

STUDY = "scale.json"
"""A study's folder has this file, see docs/how-to/scaling.md."""

MEMORY_STEPS = 2
"""At the end of a cell, in which memory is measured and no time."""

EPISODES = "train.episodes_per_step"

QUIET = (
    "eval.every=0", "eval.final=false", "eval.val_episodes=1", "run.log_every=1000000", "run.trackers=[]",
    "run.profile=null", "train.patience=null", "checkpoint.every=1000000", "checkpoint.every_minutes=null",
    "checkpoint.keep_every=null",
)  # fmt: skip
"""Of each cell: nothing but meta-steps."""

UNNAMED = ("run.dir", "run.log_every", "train.steps", "parallel.processes", "eval.", "checkpoint.")
"""Settings that no cell is told apart by."""


@dataclass(frozen=True)
class Cell:
    """One measurement: a configuration in a world of so many processes.

    Attributes:
        variant: what the study varies beside the world, in words.
        settings: the same as settings.
        kinds: ``strong``: as many episodes a meta-step in every world; ``weak``: as many a process.
        words: of ``cml-dist scale``, for each of its processes.
        config: what they train, checked.
        file: where its measurement is, or will be.
    """

    variant: str
    settings: dict[str, Any]
    world: int
    kinds: tuple[str, ...]
    words: tuple[str, ...]
    config: RunConfig
    file: Path

    @property
    def name(self) -> str:
        episodes, processes = self.config.train.episodes_per_step, f"{self.world} process{'es' * (self.world > 1)}"
        return f"{self.variant}, {processes}, {episodes} episode{'s' * (episodes > 1)} a meta-step"

    @property
    def log(self) -> Path:
        """What its processes say."""
        return self.file.with_suffix(".log")

    @property
    def run_dir(self) -> Path:
        """Removed once it is measured."""
        return self.file.with_suffix(".run")

    @property
    def is_measured(self) -> bool:
        return self.file.exists()

    def measured(self) -> dict[str, Any]:
        """What :func:`cml_dist.experiments.scale_cell.measure_cell` wrote.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            if len(found["ranks"]) != self.world:
                raise ValueError(f"{len(found['ranks'])} ranks of {self.world}")
            return found
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{self.file} is damaged: {error}", "remove it, and run the same command") from error


def parse_axes(words: Sequence[str], backbones: str | None) -> dict[str, list[Any]]:
    """``--axes KEY=V1,V2 ...`` and ``--backbones A,B`` as values by key.

    Raises:
        ConfigError: a word is no axis, or an axis is named twice.
    """
    found: dict[str, list[Any]] = {}
    for word in [*([f"model.backbone={backbones}"] if backbones is not None else []), *words]:
        key, equals, values = word.partition("=")
        if not (key and equals and all(values.split(","))):
            raise ConfigError(f"--axes has {word!r}", "write KEY=V1,V2, e.g. method.inner_steps=1,5")
        if key in found:
            raise ConfigError(f"{key} varies in two places", "name it in one")
        if key.startswith(UNNAMED):
            remedy = "worlds are those of --worlds, meta-steps those of --steps; tests and checkpoints are left out"
            raise ConfigError(f"{key} cannot vary here", remedy)
        try:
            found[key] = [yaml.safe_load(value) for value in values.split(",")]
        except yaml.YAMLError as error:
            what = f"--axes has {word!r}, of which a value cannot be read"
            raise ConfigError(what, "give numbers or words, without brackets") from error
        if len(found[key]) == 1 and key != "model.backbone":
            raise ConfigError(f"--axes has {word!r}, of one value", f"set it before --axes, or give {key} two values")
    return found


def plan_study(
    config: str, overrides: Sequence[str], preset: str | None, out: Path, *, worlds: Sequence[int],
    axes: Mapping[str, Sequence[Any]], kinds: Sequence[str], steps: int, warm_up: int, cores: int | None,
) -> tuple[list[Cell], dict[str, Any]]:  # fmt: skip
    """Every cell once, each configuration checked; nothing is written.

    Args:
        steps, warm_up: meta-steps that count, and before them.
        cores: of each process, by number; None: the launcher decides.

    Returns:
        (the cells, what all cells of the study have in common: nothing that may be added to it).

    Raises:
        ConfigError: a configuration cannot be, or a world has more processes than a meta-step has episodes.
        CheckpointError: the folder holds a study of other settings.
    """
    base, length = load_config(config, overrides, preset=preset), ["--preset", preset] if preset else []
    if base.all_splits:
        raise ConfigError("domain.split is all: that is several runs", "name one split")
    record = {**_named(base), "--steps": steps, "--warm-up": warm_up, "--cores": cores}
    _check_record(out, record)
    runs = [Run(base.model.backbone, {})]
    if axes:
        runs = Sweep(base=config, dir=str(out), axes={key: list(values) for key, values in axes.items()}).runs()
    common = [*QUIET, f"train.steps={warm_up + steps + MEMORY_STEPS}"]
    if cores is not None and base.parallel.threads is None:
        common.append(f"parallel.threads={cores}")
    found: dict[str, Cell] = {}
    for run in runs:
        varied = [*overrides, *run.overrides]
        batch = load_config(config, varied, preset=preset).train.episodes_per_step
        for kind, world in product(kinds, worlds):
            episodes = batch if kind == "strong" else max(1, batch // min(worlds)) * world
            if episodes < world:
                raise ConfigError(
                    f"--worlds has {world}, but {EPISODES} is {batch} ({run.name}): some of {world} processes "
                    "would have nothing to do",
                    f"set {EPISODES}={max(worlds)} or more, name smaller worlds, or measure --scaling weak alone",
                )
            settings = [*varied, f"{EPISODES}={episodes}", *common, f"parallel.processes={world}"]
            checked = load_config(config, settings, preset=preset)
            said = json.dumps([world, _named(checked)], sort_keys=True, default=str)
            mark = hashlib.sha256(said.encode()).hexdigest()[:8]
            file = out / "cells" / f"{Path(checked.model.backbone).name}-{world}p-{episodes}e-{mark}.json"
            words = (config, *length, *settings, f"run.dir={file.with_suffix('.run')}", f"--worlds={world}")
            words += (f"--measure={file.absolute()}", f"--warm-up={warm_up}")
            before = found[file.name].kinds if file.name in found else ()
            variant = run.name.removeprefix("backbone=")  # which says little
            own = tuple(dict.fromkeys((*before, kind)))
            found[file.name] = Cell(variant, run.settings, world, own, words, checked, file)
    return list(found.values()), record


def _named(config: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in same_everywhere(config).items() if not key.startswith(UNNAMED)}


# --------------------------------------------------------------------------- the folder


def read_study(folder: str | Path) -> dict[str, Any] | None:
    """What a study's folder says; None: it is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = Path(folder, STUDY)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["record"], found["cells"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "remove it; the same command makes it anew") from error
    return found


def _check_record(out: Path, now: dict[str, Any]) -> None:
    then = (read_study(out) or {"record": now})["record"]
    for key in {**then, **now}:
        if then.get(key) != now.get(key):
            raise CheckpointError(
                f"{out} holds another study: {key} was {then.get(key)}, is {now.get(key)}",
                "name another --out; only values of --worlds, --backbones and --axes may be added",
            )
