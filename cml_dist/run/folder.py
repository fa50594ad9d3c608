"""The run folder: what is where, and whether a configuration may go on in it."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cml_dist.config.keys import flatten
from cml_dist.config.load import RUN_CONFIG, Warn, holds_run, in_folder, merge, parse_config, read_yaml, silently
from cml_dist.config.methods import with_rate
from cml_dist.config.schema import AUTO, ImageSettings, RunConfig
from cml_dist.config.shape import with_shape
from cml_dist.config.versioned import BEFORE, NEWEST, settled, versions_of
from cml_dist.errors import CheckpointError, CmlError, ConfigError, NetworkError
from cml_dist.user_code import without_folder

NEUTRAL_KEYS = (
    *("run.dir", "run.device", "run.log_every", "run.profile", "run.stop_signals", "run.tracker"),
    *("train.max_nonfinite", "eval.final"),
    *("domain.root", "domain.cache", "domain.memory_gib", "domain.workers"),
    *("parallel.", "engine.", "memory.", "checkpoint."),
)
"""Settings that change no value that is computed, but for rounding."""

FREE_KEYS = (
    *NEUTRAL_KEYS, "train.patience", "domain.splits", "eval.episodes", "eval.split", "eval.untrained", "eval.ensemble",
)  # fmt: skip
"""Settings that a resumed run may change: no step of its training depends on them."""

OWN_TEST = "own"
"""What a test by the run's own settings is called."""

PER_MACHINE_KEYS = ("domain.root", "domain.cache")
"""Settings that may differ from machine to machine: places of the same data (its checksum is compared)."""

WEIGHTS, REST, DESCRIPTION = "model.safetensors", "learner.safetensors", "model.json"
"""Of a network that is no checkpoint: in ``export/`` and in ``start/``."""

SEEN_WITHIN_S = 60.0
"""NFS may keep an old view of a folder for as long (acdirmax)."""


class RunFolder:
    """Paths of a run, and its identity; docs/reference/run-folder.md says what each file holds."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / RUN_CONFIG
        self.deepspeed_file = self.path / "deepspeed.json"
        self.status_file = self.path / "status.json"
        self.sessions_file = self.path / "sessions.jsonl"
        self.metrics_file = self.path / "metrics.jsonl"
        self.validation_file = self.path / "validation.jsonl"
        self.eval_file = self.path / "eval.json"
        self.scores_file = self.path / "eval_scores.npz"
        self.splits_file = self.path / "splits.json"
        self.evals = self.path / "evals"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.profile = self.path / "profile"
        self.export = self.path / "export"
        self.start = self.path / "start"

    @property
    def exists(self) -> bool:
        """Whether a run lives here."""
        return self.config_file.is_file()

    def parts(self, config: RunConfig) -> list[Path]:
        """The folders of a run for each class split, also of those that have not begun; of another run none."""
        return [self.path / f"split-{k:03d}" for k in range(config.domain.splits or 0)] if config.all_splits else []

    def check_contained(self) -> None:
        """Refuse a folder from which a name leads elsewhere: who sent it would choose what is read and written there.

        ``path`` itself may be a link, and links may lead to other places in the folder. Called once by each command,
        before it uses what it finds here: to look through a folder of many files takes time on a network's disk.

        Raises:
            CheckpointError: naming a link that leads out of it, or what is neither file nor folder (a pipe, a device).
        """
        inside, folders = os.path.join(os.path.realpath(self.path), ""), [str(self.path)]
        while folders:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folders.pop()) as entries:
                for entry in entries:
                    try:
                        mode = entry.stat(follow_symlinks=False).st_mode
                    except FileNotFoundError:  # a temporary file that was renamed meanwhile
                        continue
                    if stat.S_ISLNK(mode):
                        target = os.path.realpath(entry.path)
                        if not os.path.join(target, "").startswith(inside):
                            raise CheckpointError(
                                f"{entry.path} is a link to {target}, and leads out of the run folder",
                                "move there what it leads to; run.dir itself may be a link, to a folder anywhere",
                            )
                    elif stat.S_ISDIR(mode):
                        # A folder in wandb is W&B's own, with links to its cache: nothing here reads or writes in it.
                        folders += [entry.path] if Path(entry.path).parent != self.path / "wandb" else []
                    elif not stat.S_ISREG(mode):
                        raise CheckpointError(f"{entry.path} is neither a file nor a folder", "remove it")

    def read_config(self) -> RunConfig:
        """The configuration that the run was started with; CheckpointError where no run lives here."""
        if not self.exists:
            raise CheckpointError(
                f"{self.path} is no run folder (it has no {RUN_CONFIG})", "name the run.dir of a training run"
            )
        return settled(parse_config(read_yaml(self.config_file), source=str(self.config_file)), BEFORE)

    def going_on(self, config: RunConfig) -> RunConfig:
        """``config`` with what it leaves open as in the run here: the versions of rules, and the shape of an episode.

        Where none lives here, the newest versions; the shape stays open.
        """
        with suppress(CmlError, OSError):  # claiming the folder says what is wrong there
            if self.exists:
                return _as_in(self.read_config(), config)
        return settled(config, NEWEST)

    def check_resumable(self, config: RunConfig) -> None:
        """Raise CheckpointError where the run here would no longer be that of its record.

        By a configuration that would compute something else (each value is named, then and now), or by fewer meta-steps
        than were trained.
        """
        then, done = self.read_config(), max(steps_in(self.checkpoints), default=0)
        changed = differences(then, _as_in(then, config))
        if changed:
            shown = ", ".join(f"{key} was {then!r}, is {now!r}" for key, (then, now) in changed.items())
            raise CheckpointError(
                f"{self.path} holds a run of another configuration: {shown}",
                "set these back to resume it, or choose another run.dir",
            )
        if config.train.steps < done:
            raise CheckpointError(
                f"{self.path} holds a run of {done} meta-steps, but train.steps is {config.train.steps}",
                f"set train.steps={done} or more, or choose another run.dir",
            )

    def is_as(self, config: RunConfig) -> bool:
        """Whether the run here has the values of ``config``: a finished one then has nothing left to do."""
        then = self.read_config()
        free = (*NEUTRAL_KEYS, *["domain.splits"] * (getattr(config.domain, "splits", None) is None))  # all there are
        return not changes(then, _as_in(then, config), free)

    def new_eval_file(self, asked: dict[str, Any]) -> Path:
        """An empty file for a test's summary: numbered, and named by ``asked``, what is not the run's own in it."""
        name = ",".join(f"{key}={value}" for key, value in asked.items()) or OWN_TEST
        safe = re.sub(r"[^\w.,=+-]", "_", name)[:100]
        self.evals.mkdir(parents=True, exist_ok=True)
        found = (re.match(r"\d+(?=-)", path.name) for path in self.evals.glob("*.json"))
        number = max((int(match[0]) for match in found if match), default=0)
        while True:
            number += 1
            with suppress(FileExistsError):  # of another test at the same time
                (path := self.evals / f"{number:04d}-{safe}.json").touch(exist_ok=False)
                return path

    def own_test(self) -> dict[str, Any] | None:
        """What the newest test by the run's own settings found; None where there is none that can be read."""
        before = self.evals / f"{OWN_TEST}.json"  # of versions in which eval.json was the newest test of all
        is_newer = not before.is_file() or any(self.evals.glob(f"[0-9]*-{OWN_TEST}.json"))
        with suppress(OSError, ValueError):
            return json.loads((self.eval_file if is_newer else before).read_text(encoding="utf-8"))
        return None


def _as_in(then: RunConfig, config: RunConfig) -> RunConfig:
    """``config`` with what it leaves open as in the configuration that the run began with."""
    if config.method.inner_lr == AUTO:
        config = with_rate(config, then.method.inner_lr)
    return settled(with_shape(config, dict(then.domain)), versions_of(then))


def runs_in(folder: str) -> list[str]:
    """The folder itself where it is that of a run; else all runs below it, in order of name. Links are not followed."""
    found = []
    for place, below, _ in os.walk(folder):
        if holds_run(Path(place)):
            found.append(place)
            below.clear()  # what a run keeps is its own
        below.sort()
    return found


def path_of(checkpoints: Path, step: int) -> Path:
    """The file of a checkpoint."""
    return checkpoints / f"step-{step:08d}.safetensors"


def steps_in(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first; none where there is no folder."""
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []  # a folder that cannot be read is an error
    return sorted(int(name[5:13]) for name in names if re.fullmatch(r"step-\d{8}\.safetensors", name))


def wait_until_seen(what: str, there: Callable[[], bool]) -> None:
    """Wait for what rank 0 has made in the run folder, which on all machines must be one; NetworkError where not."""
    end_s = time.monotonic() + SEEN_WITHIN_S
    while not there():
        if time.monotonic() > end_s:
            raise NetworkError(
                f"{socket.gethostname()} does not see {what}, which rank 0 has made",
                "put run.dir on a file system that all machines share, and name it by its full path",
            )
        time.sleep(0.1)


def same_everywhere(config: RunConfig) -> dict[str, Any]:
    """The settings that every process of a world must have alike, by key."""
    return {key: value for key, value in _settings(config).items() if key not in PER_MACHINE_KEYS}


def _settings(config: RunConfig) -> dict[str, Any]:
    return {key: without_folder(value) for key, value in flatten(config.model_dump(mode="json")).items()}


def differences(then: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ and may not, as key -> (then, now)."""
    free = FREE_KEYS
    if now.optim.schedule in ("constant", "step"):
        free += ("train.steps",)  # with these schedules the length changes no step
    return changes(then, now, free)


def changes(then: RunConfig, now: RunConfig, free: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as key -> (then, now), without those that begin with one of ``free``."""
    old, new = _settings(then), _settings(now)
    return {
        key: (old.get(key), new.get(key))
        for key in {**old, **new}
        if old.get(key) != new.get(key) and not key.startswith(free)
    }


def run_config(run_dir: str | Path, overrides: Sequence[str], warn: Warn = silently) -> RunConfig:
    """The configuration of the run in ``run_dir`` with overrides, which may change how it is tested.

    Raises:
        CheckpointError: no run lives there. ConfigError: an override cannot be used.
    """
    # The folder may have been moved, and a test may use another world than training did.
    folder = RunFolder(run_dir)
    folder.check_contained()
    data = in_folder(folder.read_config().model_dump(mode="json"), folder.path)
    for key in ("domain.size", "domain.statistics"):
        if any(word.startswith(f"{key}=") for word in overrides):
            raise ConfigError(f"{key} is what {run_dir} was trained with, and of no other test", "leave it out")
    data["parallel"] |= {"processes": None, "strategy": "auto", "offload": "auto", "deepspeed": None}
    config = parse_config(merge(data, overrides, warn), source=f"{run_dir}/config.yaml")
    if config.method.inner_lr == AUTO:
        config = with_rate(config, data["method"]["inner_lr"])
    return with_shape(config, data["domain"])


def on_set(config: RunConfig, place: str) -> RunConfig:
    """The configuration of a test on the packed image set at ``place``, or on ``glyphs``.

    Raises:
        ConfigError: the run reads no images.
    """
    name, data = config.domain.name, config.model_dump(mode="json")
    if not isinstance(config.domain, ImageSettings):
        raise ConfigError(f"--on names image sets, but domain.name of the run is {name}", "leave --on out")
    domain = data["domain"] | {"name": "images" if name == "glyphs" else name, "root": place}
    if place == "glyphs":
        domain |= {"name": place, "root": None}
        domain.pop("cache", None)
    return parse_config({**data, "domain": domain})
