"""The one training loop: build -> resume -> for each meta-step -> finish.

A meta-step: this rank's episodes -> meta-gradient (reduced over ranks by the strategy) -> outer step -> metrics;
validation and checkpoints in between; at the end the test of the best step, and its export. Ranks talk in
``strategy.gradient`` (the meta-gradient) and beside it in ``world.start_sum`` (terms of the metrics, the wish to stop,
whether to save, memory). The host waits for a GPU once a step, where it needs the norm of the meta-gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cml_dist.config.methods import is_classifier, learner_title, method_title
from cml_dist.config.schema import RunConfig
from cml_dist.config.versioned import versions_of
from cml_dist.data.set_shape import settled_shape
from cml_dist.distributed.allocator import memory_explained, peak_memory_gib
from cml_dist.distributed.env import restarts
from cml_dist.distributed.optim import learning_rate
from cml_dist.distributed.world import World, joined_world
from cml_dist.distributed.zero import build_strategy
from cml_dist.errors import ConfigError, TrainingError
from cml_dist.run import checkpoint as checkpoints
from cml_dist.run.advice import after_nan
from cml_dist.run.assemble import assemble
from cml_dist.run.centroid import is_compared, tell_before
from cml_dist.run.compiling import Compiling
from cml_dist.run.evaluator import evaluate
from cml_dist.run.export import Wanted, export_run
from cml_dist.run.folder import RunFolder, same_everywhere, steps_in
from cml_dist.run.hooks import OnStep, nothing
from cml_dist.run.inner_rate import settled_rate
from cml_dist.run.interrupts import STOPPED_BY_SCHEDULER, STOPPED_BY_USER, Interrupts, Stopped
from cml_dist.run.profile import StepProfile
from cml_dist.run.record import announce, versions
from cml_dist.run.report import score_run
from cml_dist.run.session import Session
from cml_dist.run.stream import episode_stream, rank_share
from cml_dist.run.validation import ended_early, kept_steps, take_in, without_gain
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.metrics import StepMetrics
from cml_dist.types import EachTime, Episode

TERMS = ("loss", "outer_loss", "score", "colearner_loss", "colearner_score", "gradient_cosine")


@dataclass(frozen=True)
class Outcome:
    """How a call of :func:`train` ended: at which step, whether the run is finished, and the exit code that says so."""

    step: int
    finished: bool
    exit_code: int = 0


def train(
    config: RunConfig, console: Console, interrupts: Interrupts | None = None, on_step: OnStep = nothing,
    world: World | None = None,
) -> Outcome:  # fmt: skip
    """Start the run in ``run.dir``, or resume it there; returns when it is finished or was asked to stop.

    Args:
        interrupts, world: open, or joined, already; None: while this runs.
        on_step: a hook, called as :mod:`cml_dist.run.hooks` says.

    Collective: every process of the world calls it with the same configuration.

    Raises:
        CmlError: anything a user can mend; on all ranks where all can know of it.
        Stopped: asked to stop before there was anything to save.
    """
    if config.all_splits:
        raise ConfigError("domain.split is all: that is several runs", "use run.splits.train_splits, or name one split")
    config = RunFolder(config.run.dir).going_on(config)
    with nullcontext(interrupts) if interrupts is not None else Interrupts(config.run.stop_signals) as interrupts:
        interrupts.raise_signals()
        with joined_world(config) if world is None else nullcontext(world) as world:
            # A remote set is fetched once a machine.
            config = world.local_main_process_first(partial(settled_shape, config, console.note))
            session = Session(config, world, console)
            trainer = Trainer(config, world, session, interrupts, on_step)
            try:
                with memory_explained(world.device):
                    return trainer.run()
            except BaseException as error:
                asked = isinstance(error, (Stopped, KeyboardInterrupt)) or interrupts.cut_short
                session.fail(error, (interrupts.stop or "SIGINT") if asked else None)
                raise
            finally:
                world.heartbeat.beat("closing files and trackers")
                trainer.on_step(trainer.step, "closing")
                session.close()


class Trainer:
    """One start of a run: its phases, and what happens between two meta-steps. See :func:`train`."""

    def __init__(
        self, config: RunConfig, world: World, session: Session, interrupts: Interrupts, on_step: OnStep
    ) -> None:
        self.config, self.world, self.session = config, world, session
        self.interrupts, self.on_step = interrupts, on_step
        self.step = 0
        self.state: dict[str, Any] = {"best": None, "validated": 0, "skipped": 0, "skipped_in_a_row": 0}
        self.state["versions"] = versions_of(config)
        self.saved_s = time.monotonic()

    def run(self) -> Outcome:
        self.build()
        self.resume()
        try:
            self.loop()
            if self.config.eval.final:
                self.finish()
        except Stopped:
            return self.stopped()
        self.session.write_status("finished", self.ended_early)
        return Outcome(self.step, finished=True)

    # ------------------------------------------------------------------ phases

    def build(self) -> None:
        """Take the folder, and make the data, the network and the strategy."""
        world, config, session = self.world, self.config, self.session
        world.assert_same_across_ranks({**same_everywhere(config), **versions()})
        session.claim()
        restart, most = restarts()
        if restart:
            session.console.note(f"Restart {restart} of {most} in place")
        # Loaded now: a damaged image is to be found before training, and not when it has ended.
        splits = ("train", "val", *([config.eval.split] if config.eval.final else []))
        self.parts = assemble(config, world, session.console, dict.fromkeys(splits))
        self.on_step(0, "assembled")
        self.state["kept"] = self.parts.kept
        self.state["data"] = self.parts.domain.fingerprint()
        self.state["inputs"] = self.parts.domain.model_inputs().model_dump(mode="json")
        # Frozen weights and statistics are in no checkpoint: they must be the same at each start.
        self.state["constants"] = checkpoints.fingerprint(self.parts.net.named_buffers())
        world.assert_same_across_ranks({f"the checksum of {what}": self.state[what] for what in ("data", "constants")})
        world.heartbeat.beat("sharing out the parameters")
        with world.heartbeat.waiting():
            self.strategy = build_strategy(config, self.parts.plan, world, self.parts.model)
        self.config = session.config = settled_rate(config, self.parts, world, session.console)

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one; record and show what this start will do."""
        world, config, session = self.world, self.config, self.session

        def look(warn: Callable[[str], None]) -> tuple[checkpoints.Checkpoint | None, str]:
            folder = session.folder.checkpoints
            if not steps_in(folder):
                return None, ""
            found, how = checkpoints.choose(folder, "last", self.parts.net, warn, self.state["data"])
            checkpoints.check_versions(found, self.state["versions"])
            return found, how

        world.heartbeat.beat("looking for a checkpoint")
        found, _ = checkpoints.on_all_ranks(world, look, session.console.warn)
        if found is not None:
            world.heartbeat.beat(f"reading step {found.step}")
            self.strategy.load(found.read, found.layout)
            self.step, self.state = found.step, {**self.state, **found.state}
            session.console.note(f"Resuming at step {self.step} of {config.train.steps} from {found.path}")
        compiled = self.state.get("compiled")
        self.compiling = Compiling(config, self.parts.model, world, session.console, compiled)
        record = session.begin(self.parts, self.step, self.state["validated"])
        # Right after a collective: a rank that a signal still ends at once would leave the others waiting for it.
        self.interrupts.defer_signals()
        if world.is_main:
            announce(session.console, config, self.parts, record)
        session.open()
        self.on_step(self.step, "started")

    def loop(self) -> None:
        """All meta-steps that are left. Raises Stopped where someone asked to stop, once it is saved."""
        config, parts, world = self.config, self.parts, self.world
        left, batch = range(self.step, config.train.steps), config.train.episodes_per_step
        shares = (rank_share(step, batch, world.rank, world.size) for step in left)
        # A second pass asks for the same episodes again: to keep them would take memory for all of a meta-step.
        indices = (index for share in shares for _ in range(parts.model.method.passes) for index in share)
        how = {"device": world.device, "dtype": parts.dtype, "workers": config.domain.workers}
        stream = episode_stream(parts.domain, "train", indices, **how)
        shown = {"score_name": parts.domain.score_name, "log_every": config.run.log_every, "best": self.best}
        shown["method"] = method_title(config)
        console = self.session.console
        profile = StepProfile(config, world, console, self.session.folder.profile, self.step)
        training = console.training(config.train.steps, self.step, **shown)
        # Closed: a traceback would keep it, and processes that make episodes are waited for when this one ends.
        with closing(stream), training as live, profile:
            if self.step == 0 and is_compared(config, parts):
                tell_before(config, parts, world, console, self.stop_wanted)
            if self.step == 0:
                self.keep_if_due()
            self.validate_if_due()
            while self.step < config.train.steps and not self.ended_early:
                with profile.step(self.step + 1):
                    metrics, stop, save = self.meta_step(stream)
                live.step(metrics)
                self.on_step(self.step, "step")
                self.keep_if_due()
                # Before a validation too, which may take long: a run that is stopped or killed in it loses no step.
                if stop or save or self.validation_due or self.step == config.train.steps:
                    self.save()
                if stop:
                    raise Stopped
                self.validate_if_due()
        if why := self.ended_early:
            ended = f"Training ended at step {self.step} of {config.train.steps}: {why}"
            console.note(f"{ended}; raise train.patience to go on")

    def finish(self) -> None:
        """Test the best step (and the untrained network), and export it."""
        config, parts, session, console = self.config, self.parts, self.session, self.session.console
        session.doing = "testing"
        tested = score_run(config, parts, self.world, console, stop=self.stop_wanted, fence=session.fence)
        session.trackers.test(tested, self.step)
        self.on_step(self.step, "tested")
        self.world.heartbeat.beat("the export")
        session.doing = "writing the export"

        def export() -> None:
            session.fence()
            if is_classifier(config):
                console.note(f"Start a run from it: cml-dist train CONFIG model.init_from={session.folder.path}")
                return
            export_run(config, parts, console, Wanted(str(tested["step"])))
            console.note(f"Run folder: {session.folder.path}")

        self.world.run_on_main(export)

    def stopped(self) -> Outcome:
        """All ranks were asked to stop, and everything is saved."""
        signals = [name for name in self.world.gather(self.interrupts.stop) if name is not None]
        by_user = all(name == "SIGINT" for name in signals)
        self.session.write_status("stopped", signals[0])
        self.session.console.note(
            f"Stopped by {'Ctrl-C' if by_user else signals[0]} after step {self.step} of {self.config.train.steps}; "
            f"everything is saved in {self.session.folder.path}. Run the same command again to go on."
        )
        return Outcome(self.step, False, STOPPED_BY_USER if by_user else STOPPED_BY_SCHEDULER)

    # ------------------------------------------------------------------ one meta-step

    def meta_step(self, stream: Iterator[Episode]) -> tuple[StepMetrics, bool, bool]:
        """Episodes -> meta-gradient -> outer step -> (metrics, whether to stop, whether a checkpoint is due)."""
        config, world = self.config, self.world
        started_s = time.perf_counter()
        num_episodes = config.train.episodes_per_step
        # The cosine costs the co-learner's meta-gradient besides: at the steps that are logged.
        is_logged = (self.step + 1) % config.run.log_every == 0
        diagnose = frozenset(range(self.step * num_episodes, (self.step + 1) * num_episodes) if is_logged else ())
        world.heartbeat.wait(f"the start of step {self.step + 1}")  # where ZeRO-3 gathers the parameters
        episodes = EachTime(lambda: self.episodes(stream))

        def computed(sums: dict[str, torch.Tensor]) -> Callable[[], list[float]]:
            self.on_step(self.step, "computed")
            # Beside the reduction of the meta-gradient, and there before the optimizer is.
            return world.start_sum(self.to_tell(sums))

        told = self.strategy.gradient(episodes, num_episodes, diagnose, self.step, meanwhile=computed)
        self.on_step(self.step, "reduced")
        lr = learning_rate(config.optim, self.step, config.train.steps)
        norm, taken = self.strategy.apply(lr, config.optim.clip_norm)
        terms, stop, save, memory_gib = self.read(told())
        world.heartbeat.beat(f"the end of step {self.step + 1}")
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
            peak_memory_gib=memory_gib,
            skipped=not taken,
            score_name=self.parts.domain.score_name,
        )
        self.session.record_step(metrics)
        self.compiling.after_step(seconds, config.train.steps - self.step)
        if config.engine.compile == "auto":
            self.state["compiled"] = self.compiling.decided
        if self.state["skipped_in_a_row"] >= (most := config.train.max_nonfinite):
            what = f"the meta-gradient was NaN or inf in {most} steps in a row, up to step {self.step}"
            raise TrainingError(what, after_nan(config, self.step, self.state["skipped"], self.session.folder))
        return metrics, stop, save or self.step % config.checkpoint.every == 0

    def to_tell(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        """What this rank adds to the sum over all ranks: terms, whether to stop and to save by time, and its memory."""
        world, pairs = self.world, 2 * len(TERMS)
        vector = torch.zeros(pairs + 2 + world.size, dtype=torch.float64, device=world.device)
        for number, term in enumerate(TERMS):
            if term in sums:
                vector[2 * number : 2 * number + 2] = sums[term]
        minutes = self.config.checkpoint.every_minutes
        # By the clock of rank 0 alone: clocks differ.
        is_time = world.is_main and minutes is not None and time.monotonic() - self.saved_s >= 60 * minutes
        vector[pairs], vector[pairs + 1] = float(self.interrupts.stop is not None), float(is_time)
        vector[pairs + 2 + world.rank] = peak_memory_gib(world.device)  # a place a rank: a sum is no maximum
        return vector

    @staticmethod
    def read(told: list[float]) -> tuple[dict[str, float | None], bool, bool, float]:
        """Means of the terms by global count (never means of means), whether to stop, to save by time, most memory."""
        values, (stop, save, *memory_gib) = told[: 2 * len(TERMS)], told[2 * len(TERMS) :]
        pairs = zip(TERMS, values[::2], values[1::2], strict=True)
        terms = {term: total / count if count else None for term, total, count in pairs}
        return terms, stop > 0, save > 0, max(memory_gib)

    def episodes(self, stream: Iterator[Episode]) -> Iterator[Episode]:
        """A pass over this rank's episodes of the next meta-step; after it a reduction brings the ranks together."""
        heartbeat, step = self.world.heartbeat, self.step + 1
        count = self.parts.plan.episodes_by_rank[self.world.rank]
        for number in range(1, count + 1):
            heartbeat.beat(f"step {step}, episode {number} of {count}")
            self.on_step(self.step, "episode")
            yield self.drawn(next(stream))
        heartbeat.wait(f"the reduction of step {step}")

    def drawn(self, episode: Episode) -> Episode:
        """The same; no name here holds on to it, which would take the memory of one more."""
        self.on_step(self.step, "drawn")
        return episode

    def stop_wanted(self) -> bool:
        """Whether this rank was asked to stop: asked before each tested episode."""
        self.on_step(self.step, "testing")
        return self.interrupts.stop is not None

    # ------------------------------------------------------------------ validation and checkpoints

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, score) of the best validation so far."""
        best = self.state["best"]
        return None if best is None else (best["step"], best["mean"])

    @property
    def ended_early(self) -> str:
        """Why training ends before its last meta-step; empty where it does not."""
        return ended_early(self.config, self.state, self.step)

    @property
    def validation_due(self) -> bool:
        every, is_last = self.config.eval.every, self.step == self.config.train.steps
        return self.state["validated"] != self.step and (is_last or (every > 0 and self.step % every == 0))

    def validate_if_due(self) -> None:
        """Score the learner that chooses the best step on the val split, and save; on resume, also one cut off."""
        if not self.validation_due:
            return
        self.session.doing = f"validating step {self.step}"
        config, domain, console = self.config, self.parts.domain, self.session.console
        learner = config.eval.learner
        with console.progress(self.session.doing, config.eval.val_episodes) as view:
            report = evaluate(
                config, self.parts, self.world, self.strategy.params(), (learner,), split="val",
                num_episodes=config.eval.val_episodes, progress=view.update, stop=self.stop_wanted,
            )[learner]  # fmt: skip
        line = {"step": self.step, "learner": learner, **report.summary()}
        take_in(config, self.state, line, domain.higher_is_better)
        self.session.record_validation(line, domain.score_name)
        row = report.row(learner_title(config, learner))
        console.validation(self.step, [row], score_name=domain.score_name, best=self.best)
        if (count := without_gain(config, self.state)) and config.train.patience:
            console.note(f"  {count} of {config.train.patience} validations without a gain (train.patience)")
        self.on_step(self.step, "validated")
        self.save()
        self.session.doing = "training"

    def keep_if_due(self) -> None:
        """A checkpoint of the trail; before the full one of the same step, at which a run may resume."""
        every, folder = self.config.checkpoint.keep_every, self.session.folder.checkpoints
        if every is not None and (self.step % every == 0 or self.step == self.config.train.steps):
            saved = self.strategy.saved_layout(), self.strategy.saved_tensors()
            checkpoints.save(self.world, folder, self.step, self.state, *saved, before=self.session.fence, trail=True)

    def save(self) -> None:
        """One checkpoint by rank 0, and the removal of those no longer kept; fails on all ranks if it fails."""
        started_s, session = time.monotonic(), self.session
        before, session.doing = session.doing, f"writing the checkpoint of step {self.step}"
        folder, layout = session.folder.checkpoints, self.strategy.saved_layout()
        tensors = self.strategy.saved_tensors()
        checkpoints.save(self.world, folder, self.step, self.state, layout, tensors, before=session.fence)
        self.on_step(self.step, "saved")

        def prune() -> None:
            session.fence()  # again: the write may have hung for as long as a requeue takes
            checkpoints.prune(folder, self.config.checkpoint.keep_last, kept_steps(self.state))

        self.world.run_on_main(prune)
        session.doing, self.saved_s = before, time.monotonic()
        session.longest_save_s = max(session.longest_save_s, self.saved_s - started_s)
