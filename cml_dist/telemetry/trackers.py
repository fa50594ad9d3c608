"""TensorBoard and W&B, off by default, through Accelerate's tracker classes.

The files in the run folder are the record. A tracker is a view of them by rank 0, and its failure costs one warning.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from cml_dist.atomic import write_text
from cml_dist.config.keys import flatten
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.metrics import StepMetrics

START_S = 30.0
"""Seconds that W&B's server may take to answer when a run starts: its own 90 would be waited for at each restart."""

CLOSE_S = 10.0
"""Seconds that a tracker may take to end: a run that is stopped has not many."""


def check_installed(config: RunConfig) -> None:
    """Refuse a tracker whose package is missing.

    Raises:
        ConfigError: naming it.
    """
    for name in config.run.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"run.trackers has {name}, which is not installed",
                "pip install 'cml-dist[trackers]', or leave it out of run.trackers",
            )


class Trackers:
    """The trackers of a run: rank 0's, which needs Accelerate's world for them.

    A resumed run goes on in the same TensorBoard folder and W&B run. TensorBoard forgets what it was shown of the steps
    after the checkpoint; W&B, which cannot, is shown them again, with the same values.

    Args:
        config: ``run.trackers`` says which; all of it is shown as hyper-parameters.
        step: the last step that is done.
        active: whether there are any here.
    """

    def __init__(self, config: RunConfig, step: int, console: Console, *, active: bool) -> None:
        self._console = console
        self._open: dict[str, GeneralTracker] = {}
        makers = {"tensorboard": _tensorboard, "wandb": _wandb}
        for name in config.run.trackers if active else ():
            if (tracker := self._try(name, makers[name], config, step)) is not None:
                self._open[name] = tracker
        if "wandb" in self._open:
            run = self._open["wandb"].tracker
            where = f"offline; later: cd {config.run.dir}; wandb sync" if run.offline else run.url
            console.note(f"W&B: {where}")

    def step(self, metrics: StepMetrics) -> None:
        """Show a meta-step: losses, scores, rate and the rest of its line in ``metrics.jsonl``."""
        if self._open:
            record = metrics.record()
            self._show(record.pop("step"), _named("train", record))

    def validation(self, line: Mapping[str, Any], score_name: str) -> None:
        """Show a validation: a line of ``validation.jsonl``."""
        self._show(line["step"], _scored("validation", score_name, line))

    def test(self, summary: Mapping[str, Any], step: int) -> None:
        """Show the final test: what ``eval.json`` holds."""
        values: dict[str, float] = {}
        further = (("ensemble_", summary.get("ensemble", {})), ("untrained_", summary["untrained"]))
        for origin, learners in (("", summary), *further):
            for learner, who in (("meta", ""), ("co", "colearner_")):
                if learner in learners:
                    values |= _scored("test", f"{origin}{who}{summary['score']}", learners[learner])
        self._show(step, values)

    def close(self) -> None:
        """Hand over what is still under way, in ``CLOSE_S`` at most: W&B may wait for the network, others for us."""
        for name, tracker in list(self._open.items()):
            closing = threading.Thread(target=self._try, args=(name, tracker.finish), daemon=True)
            closing.start()
            closing.join(CLOSE_S)
            if closing.is_alive():
                self._console.warn(f"{name} has not taken everything in {CLOSE_S:g} s; it is kept in the run folder")
        self._open.clear()

    def _show(self, step: int, values: dict[str, float]) -> None:
        for name, tracker in list(self._open.items()):
            if name == "wandb":  # the step is one more value: W&B's own count can neither repeat nor go back
                self._try(name, tracker.log, {**values, "step": step})
            else:
                self._try(name, tracker.log, values, step=step)

    def _try(self, name: str, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What the work returns; where it fails the tracker is left out."""
        try:
            return work(*arguments, **named)
        except Exception as error:
            self._open.pop(name, None)
            self._console.warn(f"{name} failed, and the run goes on without it: {' '.join(str(error).split())}")
            return None


def _scored(group: str, name: str, line: Mapping[str, Any]) -> dict[str, float]:
    """A mean and its interval under the group's name."""
    return _named(group, {name: line["mean"], f"{name}_ci95": line["ci95"]})


def _named(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {f"{group}/{key}": float(value) for key, value in values.items() if value is not None}


def _tensorboard(config: RunConfig, step: int) -> GeneralTracker:
    """``RUN_DIR/tensorboard``, without what was shown of later steps."""
    folder = Path(config.run.dir) / "tensorboard"
    fresh = not folder.exists()
    tracker = TensorBoardTracker("", folder, purge_step=step + 1)
    tracker.start()
    if fresh:  # each call makes one more entry
        tracker.store_init_configuration(_hyperparameters(config))
    return tracker


def _wandb(config: RunConfig, step: int) -> GeneralTracker:
    """The W&B run whose id is kept in ``RUN_DIR/wandb``; where it goes, WANDB_MODE, _ENTITY and _API_KEY say."""
    import wandb

    folder = Path(config.run.dir)
    id_file = folder / "wandb" / "run-id"
    if not id_file.is_file():
        write_text(id_file, uuid.uuid4().hex[:12] + "\n")
    tracker = WandBTracker(
        config.run.tracker_project or os.environ.get("WANDB_PROJECT") or "cml-dist",
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        name=folder.resolve().name,
        dir=str(folder),
        # The screen is ours: logs are in the run folder.
        settings=wandb.Settings(console="off", quiet=True, init_timeout=START_S),
    )
    tracker.start()
    tracker.tracker.define_metric("step")
    tracker.tracker.define_metric("*", step_metric="step")
    tracker.store_init_configuration(_hyperparameters(config))
    return tracker


def _hyperparameters(config: RunConfig) -> dict[str, Any]:
    """The configuration by dotted names; what trackers have no type for is text."""
    settings = flatten(config.model_dump(mode="json"))
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in settings.items()}
