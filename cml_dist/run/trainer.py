"""The one training loop.

Phases of a run: meet the other ranks; build the parts; resume or start; then for each meta-step: this rank's episodes
-> meta-gradient (reduced over ranks by the strategy) -> outer step -> metrics; validation and checkpoints in between;
at the end the test of the best step, and its export. Ranks talk in ``strategy.gradient`` (the meta-gradient) and twice
more a step in ``world.sum`` and ``world.max`` (terms of the metrics, the wish to stop, whether to save, memory).
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from cml_dist import __version__
from cml_dist.config.methods import learner_title, method_title, noise_warning
from cml_dist.config.plan import RunPlan, make_plan, plan_rows, share
from cml_dist.config.schema import RunConfig
from cml_dist.errors import CheckpointError, CmlError, TrainingError
from cml_dist.parallel.deepspeed_config import deepspeed_config, zero_stage
from cml_dist.parallel.ending import restarts
from cml_dist.parallel.gpu_memory import memory_explained
from cml_dist.parallel.launched import idle_nodes
from cml_dist.parallel.verdict import Verdict
from cml_dist.parallel.world import World, joined_world, set_arithmetic
from cml_dist.parallel.zero import build_strategy
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.assemble import Parts, assemble
from cml_dist.run.checkpoint import Checkpoint
from cml_dist.run.evaluator import evaluate
from cml_dist.run.export import export_run
from cml_dist.run.folder import RunFolder, append_json_line, same_everywhere, write_text
from cml_dist.run.interrupts import STOPPED_BY_SCHEDULER, STOPPED_BY_USER, Interrupts, Stopped
from cml_dist.run.optim import learning_rate
from cml_dist.run.report import score_run
from cml_dist.run.same_checkpoint import same_checkpoint
from cml_dist.run.session import session_record, session_rows, set_rows, set_warning, versions
from cml_dist.run.status import RunStatus, State, now, this_start
from cml_dist.run.stream import EpisodeStream, rank_share
from cml_dist.run.unfinished import Unfinished, forget_unfinished
from cml_dist.telemetry.console import Console, ResultRow, preparing
from cml_dist.telemetry.metrics import MetricsWriter, StepMetrics
from cml_dist.telemetry.rank_log import RankLog
from cml_dist.telemetry.trackers import Trackers, check_installed
from cml_dist.types import Episode

TERMS = ("loss", "outer_loss", "score", "colearner_loss", "colearner_score", "gradient_cosine")


STATUS_S = 10.0
"""Seconds after which ``status.json`` is written anew, at the next step or tested episode."""


@dataclass(frozen=True)
class Outcome:
    """How a call of :func:`train` ended: at which step, whether the run is finished, and the exit code that says so."""

    step: int
    finished: bool
    exit_code: int = 0


def train(config: RunConfig, console: Console, interrupts: Interrupts | None = None) -> Outcome:
    """Start the run in ``run.dir``, or resume it there; returns when it is finished or was asked to stop.

    Args:
        interrupts: open already; None: open while this runs.

    Collective: every process of the world calls it with the same configuration.

    Raises:
        CmlError: anything a user can mend; on all ranks where all can know of it.
        Stopped: asked to stop before there was anything to save.
    """
    with (
        nullcontext(interrupts) if interrupts is not None else Interrupts(config.run.stop_signals) as interrupts,
        joined_world(config) as world,
    ):
        run = _Run(config, world, console, interrupts)
        try:
            with memory_explained(world.device):
                return run.go()
        except BaseException as error:
            run.fail(error)
            raise
        finally:
            run.close()


class _Run:
    """One start of a run: state of the loop, and the steps between."""

    def __init__(self, config: RunConfig, world: World, console: Console, interrupts: Interrupts) -> None:
        self.config, self.world, self.interrupts = config, world, interrupts
        self.plan: RunPlan = make_plan(config, world.size)
        self.folder = RunFolder(config.run.dir)
        self.threads = set_arithmetic(config, world)
        self.metrics: MetricsWriter | None = None
        self.started, self.starts = now(), 1
        self.told_s = self.saved_s = time.monotonic()
        self.longest_s = {"step": 0.0, "save": 0.0}
        self.lost = False  # the watch ends this process
        self.step = 0
        self.state: dict[str, Any] = {"best": None, "validated": 0, "skipped": 0, "skipped_in_a_row": 0}
        self.log = RankLog(world.rank)
        self.console = console
        self.trackers = Trackers(config, 0, self.console, active=False)  # until the run has begun

    # ------------------------------------------------------------------ phases

    def go(self) -> Outcome:
        world, config = self.world, self.config
        world.check_alike({**same_everywhere(config), **versions()})
        world.together(self._claim)
        if self.folder.exists:
            self._open_log()
        world.watch.at_end = self._lost
        restart, most = restarts()
        if restart:
            self.console.note(f"Restart {restart} of {most} in place")
        with preparing(self.console) as progress:
            self.parts: Parts = assemble(config, self.plan, world, progress, self._splits())
        self.plan = self.parts.plan
        self.state["data"] = self.parts.domain.fingerprint()
        # Frozen weights and statistics are in no checkpoint: they must be the same at each start.
        self.state["constants"] = checkpoints.fingerprint(self.parts.net.named_buffers())
        world.check_alike({f"the checksum of {what}": self.state[what] for what in ("data", "constants")})
        world.watch.beat("sharing out the parameters")
        with world.watch.waiting():
            self.strategy = build_strategy(config, self.plan, world, self.parts.model)
        world.watch.beat("looking for a checkpoint")
        self._resume()
        world.together(self._announce)
        world.together(self.folder.wait_until_seen)
        # Right after the ranks met: one that still ends at once at a signal leaves the patient ones behind.
        self.interrupts.patient()
        self._open_log()  # only now: a run that never began leaves nothing behind
        world.watch.beat("starting the trackers")
        self.trackers = Trackers(config, self.step, self.console, active=world.is_main)
        try:
            self._loop()
            if config.eval.final:
                self._finish()
        except Stopped:
            return self._stopped()
        self._tell("finished", "")
        return Outcome(self.step, finished=True)

    def _stopped(self) -> Outcome:
        """All ranks were asked to stop, and everything is saved."""
        signals = [s for s in self.world.gather(self.interrupts.stop) if s is not None]
        name = signals[0] if signals else "another rank"
        by_user = all(s == "SIGINT" for s in signals)
        self._tell("stopped", name)
        self.console.note(
            f"Stopped by {'Ctrl-C' if by_user else name} after step {self.step} of {self.config.train.steps}, "
            f"{self.interrupts.seconds:.1f} s after the signal; everything is saved in {self.folder.path}. "
            "Run the same command again to go on."
        )
        return Outcome(self.step, False, STOPPED_BY_USER if by_user else STOPPED_BY_SCHEDULER)

    def _splits(self) -> tuple[str, ...]:
        """The splits that the run will read: a damaged image is to be found now, and not when training has ended."""
        used = ("train", "val", *([self.config.eval.split] if self.config.eval.final else []))
        return tuple(dict.fromkeys(used))

    def fail(self, error: BaseException) -> None:
        """Leave word of an end before the end in the run folder."""
        self.world.watch.blame(error)
        self.log.failed(error)
        if not self.folder.claimed or not self.folder.exists:
            return
        asked = isinstance(error, (Stopped, KeyboardInterrupt)) or self.interrupts.cut_short
        reason = (self.interrupts.stop or "SIGINT") if asked else str(error) or repr(error)
        self.step = self.step or max(checkpoints.steps_in(self.folder.checkpoints), default=0)
        with suppress(CmlError):  # the first error counts
            self._tell("stopped" if asked else "failed", reason)

    def _lost(self, verdict: Verdict) -> None:
        """The watch is about to end this process, from a thread of its own: what it says is the last word."""
        self.lost = True
        if self.folder.claimed and self.folder.exists:
            self._write_status("failed" if verdict.stop_code is None else "stopped", verdict.what)

    def _tell(self, state: State, reason: str) -> None:
        """Rank 0 writes ``status.json``."""
        if self.world.is_main and not self.lost:
            self._write_status(state, reason)

    def _write_status(self, state: State, reason: str) -> None:
        start, seen = this_start(), self.longest_s
        self.folder.check_ours()
        status = RunStatus(
            state=state,
            reason=reason,
            step=self.step,
            steps=self.config.train.steps,
            time=now(),
            started=self.started,
            world=self.world.size,
            method=method_title(self.config),
            host=start.host,
            pid=start.pid,
            job=start.job,
            restart=start.restart,
            starts=self.starts,
            # A signal may come as a save begins, after which ranks next agree at the end of a meta-step.
            exit_s=round(seen["step"] + 2 * seen["save"], 3) if all(seen.values()) else None,
        )
        write_text(self.folder.status_file, status.text())
        self.told_s = time.monotonic()

    def _tell_if_due(self, what: str) -> None:
        if time.monotonic() - self.told_s >= STATUS_S:
            self._tell("running", what)

    def close(self) -> None:
        """Close the files; the folder is free for another trainer."""
        self.world.watch.beat("closing files and trackers")
        if self.metrics is not None:
            self.metrics.close()
        self.trackers.close()
        self.log.close()
        self.folder.release()

    def _claim(self) -> None:
        """Rank 0 takes the folder, new or resumable; the others hear if it may not."""
        if self.world.is_main:
            check_installed(self.config)
            if self.folder.exists:
                self.folder.check_resumable(self.config)
            self.folder.claim()

    def _resume(self) -> None:
        """Load the newest whole checkpoint, and drop the metrics of steps after it."""
        world = self.world
        found, faults = same_checkpoint(
            world, lambda: checkpoints.load_newest(self.folder.checkpoints, world.watch.touch), self.console.note
        )
        step = -1 if found is None else found.step
        for fault in faults:
            self.console.warn(f"{fault.what}: the one before it is used")
        if faults and self.world.is_main:
            self.folder.check_ours()
            checkpoints.set_aside(self.folder.checkpoints, step)
        if found is not None:
            self.world.together(lambda: checkpoints.check_fits(found, self.strategy.saved_layout()))
            self.world.together(lambda: self._check_data(found))
            self.strategy.load(self._read_from(found), found.layout)
            self.step, self.state = found.step, {**self.state, **found.state}
            self.console.note(f"Resuming at step {self.step} of {self.config.train.steps} from {found.path}")
        if self.world.is_main:
            self.folder.check_ours()  # loading the data may have taken as long as a requeue
            self.metrics = MetricsWriter(self.folder.metrics_file)
            self.metrics.truncate_after(self.step)
            MetricsWriter(self.folder.validation_file).truncate_after(self.state["validated"])

    def _read_from(self, found: Checkpoint) -> Callable[[str], torch.Tensor]:
        """Reads a tensor, of which the watch hears: a large model on a slow disk takes its time."""

        def read(name: str) -> torch.Tensor:
            self.world.watch.beat(f"reading step {found.step}")
            return found.read(name)

        return read

    def _check_data(self, found: Checkpoint) -> None:
        """Where the set lies may change from start to start, but not what is in it."""
        then, now = found.state["data"], self.parts.domain.fingerprint()
        if then != now:
            raise CheckpointError(
                f"the data is not that of the run in {self.folder.path} (checksum {then[:12]}, now {now[:12]})",
                "point domain.root at the same packed set, or choose another run.dir",
            )
        checkpoints.check_constants(found, self.parts.net)

    def _announce(self) -> None:
        """Say and record what will happen here."""
        if not self.world.is_main:
            return
        record = session_record(self.plan, self.parts, self.world, self.threads, self.step)
        self.folder.check_ours()
        self.folder.begin(self.config)
        if zero_stage(self.plan.strategy) is not None:
            dictionary = json.dumps(deepspeed_config(self.config, self.plan), indent=2)
            write_text(self.folder.deepspeed_file, dictionary + "\n")
        append_json_line(self.folder.sessions_file, record)
        self.starts = len(self.folder.sessions_file.read_bytes().splitlines())
        self._tell("running", "training")
        rows = {**plan_rows(self.config, self.plan), **session_rows(record), **set_rows(self.config, self.parts)}
        self.console.header("cml-dist train", rows)
        for warning in (set_warning(self.config, self.parts), noise_warning(self.config), idle_nodes()):
            if warning is not None:
                self.console.warn(warning)

    def _open_log(self) -> None:
        """This rank's log, in a folder where a run lives."""
        world, start = self.world, this_start()
        job = f", job {start.job}" if start.job else ""
        restart = f", restart {start.restart}" if start.restart else ""
        self.log.open(
            self.folder.logs,
            f"-------- cml-dist {__version__}: rank {world.rank} of {world.size} (here {world.local_rank} of "
            f"{world.local_size}), pid {start.pid} on {start.host}{job}{restart}",
        )
        world.watch.log = self.log.file

    def _loop(self) -> None:
        """All meta-steps that are left. Raises Stopped where someone asked to stop, once it is saved."""
        config, world = self.config, self.world
        mine = len(share(config.train.episodes_per_step, world.rank, world.size))
        stream = EpisodeStream(
            self.parts.domain,
            "train",
            self._indices(),
            device=world.device,
            dtype=self.parts.dtype,
            workers=config.domain.workers,
        )
        score_name = self.parts.domain.score_name
        with self.console.training(
            config.train.steps, self.step, score_name=score_name, log_every=config.run.log_every, best=self._best()
        ) as live:
            self._validate_if_due()
            if self.step < config.train.steps and world.is_main:
                self.folder.check_ours()
                forget_unfinished(self.folder)  # of a step that is trained anew, since its checkpoint is lost
            while self.step < config.train.steps:
                metrics, wishes = self._meta_step(self._handed_out(stream, mine))
                live.step(metrics)
                # Saved before a long validation too: who stops or is killed in it loses nothing, and resume runs it.
                if wishes.stop or wishes.save or self._validation_due() or self._checkpoint_due():
                    self._save()
                if wishes.stop:
                    raise Stopped
                self._tell_if_due("training")
                self._validate_if_due()

    def _finish(self) -> None:
        """Test the best step (and the untrained network), and export it."""
        self._tell("running", "final test")
        tested = score_run(
            self.config, self.plan, self.parts, self.folder, self.world, self.console, stop=self._stop_wanted
        )
        self.trackers.test(tested, self.step)
        self.world.together(lambda: self._export(tested["step"]))

    def _export(self, step: int) -> None:
        self.world.watch.beat("the export")
        if self.world.is_main:
            made = export_run(self.config, self.parts, self.folder, self.console, str(step))
            self.console.note(f"Exported model: {made}")
            self.console.note(f"Run folder: {self.folder.path}")

    # ------------------------------------------------------------------ one meta-step

    def _meta_step(self, episodes: Iterator[Episode]) -> tuple[StepMetrics, _Wishes]:
        """Episodes -> meta-gradient -> outer step -> metrics; returns them, and what any rank wishes."""
        config, world = self.config, self.world
        started_s = time.perf_counter()
        num_episodes = config.train.episodes_per_step
        # The cosine costs the co-learner's meta-gradient besides: at the steps that are logged.
        is_logged = (self.step + 1) % config.run.log_every == 0
        diagnose = frozenset(range(self.step * num_episodes, (self.step + 1) * num_episodes) if is_logged else ())
        world.watch.wait(f"the start of step {self.step + 1}")  # where ZeRO-3 gathers the parameters
        sums = self.strategy.gradient(episodes, num_episodes, diagnose, self.step)
        lr = learning_rate(config.optim, self.step, config.train.steps)
        norm, taken = self.strategy.apply(lr, config.optim.clip_norm)
        world.watch.beat(f"the end of step {self.step + 1}")
        terms, wishes = self._reduce(sums)
        self.step += 1
        self.state["skipped"] += not taken
        self.state["skipped_in_a_row"] = 0 if taken else self.state["skipped_in_a_row"] + 1
        seconds = time.perf_counter() - started_s
        metrics = StepMetrics(
            step=self.step,
            **terms,
            grad_norm=norm,
            lr=lr,
            seconds=seconds,
            episodes_per_s=num_episodes / seconds,
            peak_memory_gib=world.max(_peak_memory_gib(world.device)),
            skipped=not taken,
            score_name=self.parts.domain.score_name,
        )
        self.longest_s["step"] = max(self.longest_s["step"], seconds)
        if self.metrics is not None:
            self.folder.check_ours()
            self.metrics.write(metrics)
        self.trackers.step(metrics)
        if self.state["skipped_in_a_row"] >= config.train.max_nonfinite:
            raise TrainingError(
                f"the meta-gradient was NaN or inf in {config.train.max_nonfinite} steps in a row, "
                f"up to step {self.step}",
                "lower method.inner_lr or optim.lr, or set optim.clip_norm; the last checkpoint stays in "
                f"{self.folder.checkpoints}",
            )
        return metrics, wishes

    def _reduce(self, sums: dict[str, torch.Tensor]) -> tuple[dict[str, float | None], _Wishes]:
        """Means of the terms by global count (never means of means), and what any rank wishes."""
        vector = torch.zeros(2 * len(TERMS) + 2, dtype=torch.float64, device=self.world.device)
        for number, term in enumerate(TERMS):
            if term in sums:
                vector[2 * number : 2 * number + 2] = sums[term]
        vector[-2] = float(self.interrupts.stop is not None)
        vector[-1] = float(self._time_to_save())
        *values, stop, save = self.world.sum(vector).tolist()
        pairs = zip(TERMS, values[::2], values[1::2], strict=True)
        return {term: total / count if count else None for term, total, count in pairs}, _Wishes(stop > 0, save > 0)

    def _stop_wanted(self) -> bool:
        """Whether this rank was asked to stop: asked between tested episodes, where a run shows that it lives."""
        self._tell_if_due("testing")
        return self.interrupts.stop is not None

    def _handed_out(self, stream: EpisodeStream, count: int) -> Iterator[Episode]:
        """The next episodes. The watch hears of each; after the last one the reduction brings the ranks together."""
        watch, step = self.world.watch, self.step + 1
        for number in range(1, count + 1):
            watch.beat(f"step {step}, episode {number} of {count}")
            yield next(stream)
        watch.wait(f"the reduction of step {step}")

    # ------------------------------------------------------------------ validation and checkpoints

    def _indices(self) -> Iterator[int]:
        """This rank's training episodes from the present step to the end of the run."""
        batch = self.config.train.episodes_per_step
        for step in range(self.step, self.config.train.steps):
            yield from rank_share(step, batch, self.world.rank, self.world.size)

    def _validate_if_due(self) -> None:
        """Validate the present step, and keep what came of it; on resume, also what was cut off."""
        if self._validation_due():
            self._validate()
            self._save()

    def _validation_due(self) -> bool:
        every = self.config.eval.every
        if self.state["validated"] == self.step:
            return False
        return self.step == self.config.train.steps or (every > 0 and self.step % every == 0)

    def _checkpoint_due(self) -> bool:
        return self.step == self.config.train.steps or self.step % self.config.checkpoint.every == 0

    def _time_to_save(self) -> bool:
        """Whether ``checkpoint.every_minutes`` have passed, by the clock of rank 0 alone: clocks differ."""
        minutes = self.config.checkpoint.every_minutes
        return self.world.is_main and minutes is not None and time.monotonic() - self.saved_s >= 60 * minutes

    def _best(self) -> tuple[int, float] | None:
        """(step, score) of the best validation so far."""
        best = self.state["best"]
        return None if best is None else (best["step"], best["mean"])

    def _validate(self) -> None:
        """Score the learner that chooses the best step on the val split, and remember the best so far."""
        config, domain = self.config, self.parts.domain
        learner = config.eval.learner
        with self.console.progress("validation", config.eval.val_episodes) as view:
            report = evaluate(
                self.strategy.params(),
                self.parts.model.problem,
                replace(self.parts.model.method, inner_steps=self.plan.test_inner_steps),
                domain,
                self.world,
                split="val",
                num_episodes=config.eval.val_episodes,
                learners=(learner,),
                co_adapt=config.eval.co_adapt,
                norm=config.eval.norm,
                dtype=self.parts.dtype,
                workers=config.domain.workers,
                progress=view.update,
                stop=self._stop_wanted,
                kept=Unfinished(self.folder, {"validation": self.step, "data": self.state["data"], "learner": learner}),
            )[learner]
        best = self.state["best"]
        sign = 1 if domain.higher_is_better else -1
        is_best = math.isfinite(report.mean) and (best is None or sign * report.mean > sign * best["mean"])
        line = {"step": self.step, "learner": learner, **report.summary()}
        self.state["validated"] = self.step
        if is_best:
            self.state["best"] = line
        if self.world.is_main:
            self.folder.check_ours()
            append_json_line(self.folder.validation_file, line)
            forget_unfinished(self.folder)
        self.trackers.validation(line, domain.score_name)
        row = ResultRow(learner_title(config, learner), report.mean, report.ci95, len(report.scores))
        self.console.validation(self.step, [row], score_name=domain.score_name, best=self._best())

    def _save(self) -> None:
        """One checkpoint by rank 0, and the removal of those no longer kept; fails on all ranks if it fails."""
        started_s = time.monotonic()
        layout, tensors = self.strategy.saved_layout(), self.strategy.saved_tensors()
        checkpoints.save(
            self.world, self.folder.checkpoints, self.step, self.state, layout, tensors, before=self.folder.check_ours
        )

        def prune() -> None:
            if self.world.is_main:
                self.folder.check_ours()  # the last write may have hung for as long as a requeue takes
                best = self.state["best"]
                keep = frozenset() if best is None else frozenset({best["step"]})
                checkpoints.prune(self.folder.checkpoints, self.config.checkpoint.keep_last, keep)

        self.world.together(prune)
        self.saved_s = time.monotonic()
        self.longest_s["save"] = max(self.longest_s["save"], self.saved_s - started_s)


@dataclass(frozen=True)
class _Wishes:
    """What at least one rank wishes after a meta-step: to stop, or a checkpoint since the time has come."""

    stop: bool
    save: bool


def _peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: of the GPU's allocator, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
