"""A sweep and its folder: which of its runs stand how, and how long the rest will take. No torch."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cml_dist.atomic import write_text
from cml_dist.config.keys import flatten
from cml_dist.config.load import Warn, load_config, silently
from cml_dist.config.methods import unlabelled_steps
from cml_dist.config.schema import RunConfig
from cml_dist.config.sweep import Run, Sweep, parse_sweep
from cml_dist.errors import CheckpointError, CmlError, ConfigError
from cml_dist.run.folder import FREE_KEYS, RunFolder, runs_in
from cml_dist.telemetry.metrics import read_metrics
from cml_dist.tools.run_status import SWEEP_RECORD, is_gone, state_of
from cml_dist.user_code import SETTINGS, is_code


@dataclass(frozen=True)
class Job:
    """One run of a sweep as it stands.

    Attributes:
        run: its name and settings.
        words: of ``cml-dist train``: the configuration, and what replaces it.
        config: the same, checked.
        state: as of ``state_of``; ``waiting``: it has not begun; ``broken``: its folder cannot be used.
        reason: of that state, in words; may be empty.
        step: meta-steps done.
        step_s: seconds of one, as measured here or on another run of the sweep; None: nobody knows.
    """

    run: Run
    words: tuple[str, ...]
    config: RunConfig
    state: str = "waiting"
    reason: str = ""
    step: int = 0
    step_s: float | None = None

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.run.dir)

    @property
    def log(self) -> Path:
        """What its processes say: beside its folder, which must be empty until the run begins."""
        return Path(f"{self.config.run.dir}.log")

    @property
    def is_due(self) -> bool:
        """Whether it is to be started: again, where it was stopped, killed, or failed."""
        return self.state in ("waiting", "stopped", "dead", "failed")

    @property
    def processes(self) -> int:
        return self.config.parallel.processes or 1

    @property
    def left_s(self) -> float:
        """Seconds to its last meta-step."""
        return (self.config.train.steps - self.step) * (self.step_s or 0.0) if self.is_due else 0.0

    def command(self, *more: str) -> list[str]:
        """What trains it in a process of its own, with further settings."""
        launch = ["launch", "local", f"--processes={self.processes}", "--"] if self.processes > 1 else []
        return [sys.executable, "-m", "cml_dist", *launch, "train", *self.words, *more]


def survey(sweep: Sweep, code: Collection[str] = (), warn: Warn = silently) -> list[Job]:
    """Every run of a sweep as it stands, its configuration checked; nothing is written.

    Args:
        code: of a user's own, which the sweep may name.

    Raises:
        ConfigError: a run's configuration cannot be, or names other code.
        CheckpointError: the folder holds another sweep, or a run of another configuration.
    """
    _check_record(sweep)
    jobs: list[Job] = []
    for run in sweep.runs():
        if unknown := [v for k, v in run.settings.items() if k in SETTINGS and is_code(v) and v not in code]:
            what = f"the sweep names {unknown[0]}, which is code, and no file imports any"
            raise ConfigError(what, f"if you trust that code, name it on the command line: --code {unknown[0]}")
        words = (sweep.base, *run.overrides, f"run.dir={Path(sweep.dir) / run.name}")
        try:
            config = load_config(words[0], words[1:], silently if jobs else warn)
            jobs.append(_standing(Job(run, words, config)))
        except CmlError as error:
            raise type(error)(f"run {run.name}: {error.what}", error.remedy) from error
    return jobs


def _standing(job: Job) -> Job:
    """The job as its folder has it."""
    try:
        found = state_of(job.folder.path)
        there = job.folder.exists and job.folder.read_config()
    except (CmlError, OSError) as error:
        return replace(job, state="broken", reason=str(error))
    if there:
        job.folder.check_resumable(job.config)
    state = {"unknown": "waiting"}.get(found["state"], found["state"])
    if state == "finished" and not job.folder.is_as(job.config):
        state = "stopped"  # longer, or tested otherwise, than it was
    if state == "running" and is_gone(found.get("host"), found.get("pid")):
        state = "dead"  # should it live after all, the run's lock keeps a second one out
    seconds = seconds_a_step(job.folder)
    return replace(job, state=state, reason=found["reason"], step=steps_done(job.folder), step_s=seconds)


def steps_done(folder: RunFolder) -> int:
    """Meta-steps that a run has recorded."""
    return max((line["step"] for line in read_metrics(folder.metrics_file, last_bytes=1 << 12)), default=0)


def seconds_a_step(folder: RunFolder) -> float | None:
    """Of the last meta-steps but the first of all, which is slower; None: there are none."""
    lines = read_metrics(folder.metrics_file, last_bytes=1 << 16)
    seconds = [line["seconds"] for line in lines if line["step"] > 1 and line.get("seconds")]
    return statistics.median(seconds) if seconds else None


def work(config: RunConfig) -> float:
    """Examples that pass through the network in a meta-step: what its seconds are about in proportion to."""
    domain, method = config.domain, config.method
    ways = getattr(domain, "ways", 1) or 1
    support, query = ((getattr(domain, key, None) or 1) * ways for key in ("shots", "queries"))
    lower, upper = (method.sharp in (level, "both") for level in ("lower", "upper"))
    seen = method.inner_steps * (1 + lower) * support + query
    if method.name == "warpgrad":  # each step once more, with a query after it
        seen += method.inner_steps * (support + query)
    if steps := unlabelled_steps(config):
        seen += steps * (support + domain.unlabelled * (ways + domain.distractors))
    networks = 1 + len(method.augment_ratios) * bool(method.augment)
    return config.train.episodes_per_step * (1 + upper) * networks * seen


def estimated(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with seconds of a step, from runs of the same settings but for the seed, else by the :func:`work` of all
    that have any.
    """
    known: dict[str, list[float]] = {}
    for job in jobs:
        if job.step_s is not None:
            known.setdefault(job.run.variant, []).append(job.step_s)
    if not known:
        return list(jobs)
    usual_s = statistics.median(job.step_s / work(job.config) for job in jobs if job.step_s is not None)
    alike_s = {variant: statistics.median(seconds) for variant, seconds in known.items()}
    return [replace(job, step_s=job.step_s or alike_s.get(job.run.variant, usual_s * work(job.config))) for job in jobs]


# --------------------------------------------------------------------------- the folder


def write_record(sweep: Sweep) -> None:
    """Say in the sweep's folder, which is made, what it is."""
    Path(sweep.dir).mkdir(parents=True, exist_ok=True)
    write_text(Path(sweep.dir, SWEEP_RECORD), json.dumps(sweep.model_dump(mode="json"), indent=2) + "\n")


def read_record(folder: str | Path) -> Sweep | None:
    """The sweep whose folder this is; None: of none.

    Raises:
        CheckpointError: its record is damaged.
    """
    path = Path(folder, SWEEP_RECORD)
    try:
        return parse_sweep(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "remove it; the sweep's own file makes it anew") from error


def runs_of(folder: str) -> list[str]:
    """The folders of all runs of the sweep in ``folder``, also of those that have not begun; else see ``runs_in``."""
    sweep = read_record(folder)
    return runs_in(folder) if sweep is None else [str(Path(folder, run.name)) for run in sweep.runs()]


def _check_record(sweep: Sweep) -> None:
    if (then := read_record(sweep.dir)) is None:
        return
    one, other = ({**each.identity(), **_fixed(each.set)} for each in (then, sweep))
    for key in {**one, **other}:
        if one.get(key) != other.get(key):
            raise CheckpointError(
                f"{sweep.dir} holds another sweep: {key} was {one.get(key)}, is {other.get(key)}",
                "name another dir; only values, variants, draws and seeds may be added",
            )


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(settings).items() if not key.startswith(FREE_KEYS)}
