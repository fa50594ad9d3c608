"""One start of a run in its folder: who may write there, how it stands, its metrics, trackers and logs."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cml_dist import __version__
from cml_dist.atomic import append_json_line, write_text
from cml_dist.config.load import dump_config
from cml_dist.config.methods import method_title
from cml_dist.config.schema import AUTO, RunConfig
from cml_dist.distributed.deepspeed import deepspeed_config, zero_stage
from cml_dist.distributed.env import this_start
from cml_dist.distributed.failure import Failure
from cml_dist.distributed.world import World
from cml_dist.errors import CheckpointError, CmlError
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.assemble import Parts
from cml_dist.run.folder import RunFolder, changes, steps_in, wait_until_seen
from cml_dist.run.lease import Lease
from cml_dist.run.record import session_record
from cml_dist.run.status import RunStatus, State, now
from cml_dist.run.warm_start import keep_start
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.metrics import MetricsWriter, StepMetrics, keep_until
from cml_dist.telemetry.rank_log import RankLog
from cml_dist.telemetry.trackers import Trackers, check_installed

STATUS_S = 10.0
"""Seconds between two writes of ``status.json`` while a run does one thing, however long a meta-step takes."""


class Session:
    """This rank's part in the run folder; rank 0 alone writes there, but for the logs.

    Attributes:
        folder: the run's.
        console: the screen of rank 0; what it says is in this rank's log too.
        trackers: those of ``run.trackers``, once the run has begun.
        step: meta-steps done.
        doing: ``training``, ``validating step 300``, ``testing``, ``writing the export``, for ``status.json``.
        longest_step_s, longest_save_s: so far; a safe exit may take as long.
    """

    def __init__(self, config: RunConfig, world: World, console: Console) -> None:
        self.config, self.world, self.console = config, world, console
        self.folder, self.start = RunFolder(config.run.dir), this_start()
        self._asked_rate = config.method.inner_lr
        self._log = RankLog(world.rank)
        self.trackers = Trackers(config, 0, console, active=False)  # until the run has begun
        self._metrics: MetricsWriter | None = None  # rank 0's, once the run has begun
        self._lease: Lease | None = None
        self._made: list[Path] = []  # folders that claim() made, innermost first
        self.step, self.doing = 0, "starting"
        self._started, self._starts = now(), 1
        self.longest_step_s = self.longest_save_s = 0.0
        self._writing, self._over = threading.Lock(), threading.Event()

    def claim(self) -> None:
        """Keep other trainers out of the folder while this process lives. Collective: all ranks.

        Raises:
            CheckpointError: it cannot be written, holds something else or a run of another configuration, or another
                trainer is at work in it.
        """
        self.world.run_on_main(self._claim)
        self.world.heartbeat.at_end = self._lost
        if self.folder.exists:
            self._open_log()

    def begin(self, parts: Parts, step: int, validated: int) -> dict[str, Any]:
        """Record that a start goes on at ``step``: from now on a run lives here; returns what is recorded of it.

        What was written of later steps goes: metrics, validations after step ``validated``, damaged checkpoints.

        Collective: all ranks.
        """
        record = session_record(parts, self.world, step)
        if self._asked_rate == AUTO:
            record["inner_lr"] = AUTO  # of which config.yaml has the number that was chosen
        self.step, self.doing = step, "training"
        self.world.run_on_main(lambda: self._begin(parts, record, validated))
        here = f"run.dir {self.folder.path.resolve()}"
        self.world.run_on_all_ranks(lambda: wait_until_seen(here, lambda: self.folder.exists))
        return record

    def open(self) -> None:
        """Open this rank's log and the trackers: a run that never began leaves neither."""
        self._open_log()
        self.world.heartbeat.beat("starting the trackers")
        self.trackers = Trackers(self.config, self.step, self.console, active=self.world.is_main)

    def fail(self, error: BaseException, stopped_by: str | None) -> None:
        """Record why the run ends early: the signal that stopped it, else the error."""
        self.world.heartbeat.blame(error)
        self._log.failed(error)
        with suppress(CmlError):  # the first error counts
            self.write_status("stopped" if stopped_by else "failed", stopped_by or str(error) or repr(error))

    def close(self) -> None:
        """Close the files; the folder is free for another trainer, and of a run that never began nothing is left."""
        with self._writing:
            self._over.set()
        if self._metrics is not None:
            self._metrics.close()
        self.trackers.close()
        self.world.heartbeat.log = None
        self._log.close()
        if self._lease is not None:
            self._lease.release(began=self.folder.exists)
        if not self.folder.exists:
            with suppress(OSError):  # where something else lies in the folder, it stays
                for folder in self._made:
                    folder.rmdir()

    def fence(self) -> None:
        """Raise CheckpointError where a later start of this run has taken over the folder; called by rank 0 alone."""
        self._lease.check()

    def record_step(self, metrics: StepMetrics) -> None:
        """Write a meta-step's line."""
        self.step = metrics.step
        self.longest_step_s = max(self.longest_step_s, metrics.seconds)
        if self._metrics is not None:
            self._metrics.write(metrics)
        self.trackers.step(metrics)

    def record_validation(self, line: dict[str, Any], score_name: str) -> None:
        """Write a validation's line."""
        if self.world.is_main:
            self.fence()
            append_json_line(self.folder.validation_file, line)
        self.trackers.validation(line, score_name)

    def write_status(self, state: State, reason: str) -> None:
        """Write ``status.json``, where a run lives here, and no later start of it has taken over.

        Nothing is written after the first state that is not ``running``.
        """
        if self._lease is None or not self.folder.exists:
            return
        with self._writing:
            if self._over.is_set():
                return
            if state != "running":
                self._over.set()
            with suppress(CheckpointError):
                self._lease.check()
                write_text(self.folder.status_file, self._status(state, reason).text())

    def _status(self, state: State, reason: str) -> RunStatus:
        # A signal may come as a save begins, after which ranks next agree at the end of a meta-step.
        exit_s = round(self.longest_step_s + 2 * self.longest_save_s, 3) if self.longest_save_s else None
        return RunStatus(
            state=state,
            reason=reason,
            step=self.step,
            steps=self.config.train.steps,
            time=now(),
            started=self._started,
            world=self.world.size,
            method=method_title(self.config),
            host=self.start.host,
            pid=self.start.pid,
            job=self.start.job,
            restart=self.start.restart,
            starts=self._starts,
            exit_s=exit_s,
        )

    def _claim(self) -> None:
        folder = self.folder
        check_installed(self.config)
        if folder.exists:
            folder.check_resumable(self.config)
            self.step = max(steps_in(folder.checkpoints), default=0)
        try:
            self._made = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
            folder.path.mkdir(parents=True, exist_ok=True)
            # Hidden files and the lock are what a start leaves that was killed early.
            if not folder.exists and any(p.name != "lock" and p.name[0] != "." for p in folder.path.iterdir()):
                raise CheckpointError(f"run.dir {folder.path} is not empty and holds no run", "choose another run.dir")
            folder.check_contained()
            self._lease = Lease(folder.path, self.start)
        except OSError as error:
            raise CheckpointError(
                f"cannot write run.dir {folder.path}: {error.strerror}", "choose a folder that can be written"
            ) from error
        self.write_status("running", self.doing)
        threading.Thread(target=self._keep_status_fresh, name="status", daemon=True).start()

    def _begin(self, parts: Parts, record: dict[str, Any], validated: int) -> None:
        folder = self.folder
        self.fence()  # loading the data may have taken as long as a requeue
        checkpoints.set_aside(folder.checkpoints, self.step)
        keep_until(folder.metrics_file, self.step)
        keep_until(folder.validation_file, validated)
        self._metrics = MetricsWriter(folder.metrics_file)
        if folder.exists:
            record["changed"] = changes(folder.read_config(), self.config, ())
        write_text(folder.config_file, dump_config(self.config))
        if parts.taken_over is not None:
            keep_start(self.config, parts.net, parts.domain.model_inputs())
        if zero_stage(parts.plan.strategy) is not None:
            dictionary = deepspeed_config(self.config, parts.plan, os.environ)
            write_text(folder.deepspeed_file, json.dumps(dictionary, indent=2) + "\n")
        append_json_line(folder.sessions_file, record)
        self._starts = len(folder.sessions_file.read_bytes().splitlines())
        self.write_status("running", self.doing)

    def _open_log(self) -> None:
        world, start = self.world, self.start
        job = f", job {start.job}" if start.job else ""
        self._log.open(
            self.folder.logs,
            f"-------- cml-dist {__version__}: rank {world.rank} of {world.size} (here {world.local_rank} of "
            f"{world.local_size}), pid {start.pid} on {start.host}{job}, restart {start.restart}",
        )
        world.heartbeat.log = self._log.file

    def _lost(self, failure: Failure) -> None:
        """Called by the heartbeat, which is about to end this process: its reason is the one that stays."""
        self.write_status("failed" if failure.stop_code is None else "stopped", failure.what)

    def _keep_status_fresh(self) -> None:
        written_s, told = 0.0, ""
        while not self._over.wait(min(1.0, STATUS_S)):
            if told != self.doing or time.monotonic() - written_s >= STATUS_S:
                written_s, told = time.monotonic(), self.doing
                with suppress(CmlError):  # a full disk: the next checkpoint says so
                    self.write_status("running", told)
