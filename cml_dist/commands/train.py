"""``cml-dist train``: the run under the signals that may stop it."""

from __future__ import annotations

import argparse
import os
import signal
from typing import TYPE_CHECKING

from cml_dist.distributed.env import check_launch, launched_by_torchrun, restarts
from cml_dist.distributed.exit import signal_when_parent_ends
from cml_dist.distributed.heartbeat import this_heartbeat
from cml_dist.run.interrupts import STOPPED_BY_SCHEDULER, STOPPED_BY_USER, Interrupts, Stopped

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console


def train(args: argparse.Namespace, console: Console) -> int:
    from cml_dist.config.load import load_config
    from cml_dist.config.plan import make_plan

    config = load_config(args.config, args.overrides, console.warn, args.preset)
    # Open to the end of a process of ours: a signal as it leaves must not turn a saved run into a killed one.
    interrupts = args.held.enter_context(Interrupts(config.run.stop_signals))
    if launched_by_torchrun():
        # Of a launcher that is killed (or that a signal ends which it does not know, e.g. SIGUSR1) nothing would be
        # left to end its ranks: they stop and save.
        signal_when_parent_ends(signal.SIGTERM)
    try:
        # Before the imports below, which take their time.
        make_plan(config, check_launch(config.parallel.processes).size, os.environ)
        console.loading()
        if config.all_splits:
            from cml_dist.run.splits import train_splits as train
        else:
            from cml_dist.run.trainer import train

        code = _exit_code(train(config, console, interrupts, args.on_step).exit_code)
    except (Stopped, Exception) as stopped:
        if not isinstance(stopped, Stopped) and not interrupts.cut_short:
            interrupts.defer_signals()  # a launcher that ends all after the first must not break off who says why
            raise
        this_heartbeat().blame(stopped)  # a launcher stops all when one dies
        code = _exit_code(STOPPED_BY_SCHEDULER)
        cause = f"it was stopped by {interrupts.stop} before training began"
        this_heartbeat().fail(cause, everywhere=True, stop_code=code)  # the signal may have reached this rank alone
        console.warn(f"Stopped by {interrupts.stop} before training began; nothing is lost: run the same command again")
    except KeyboardInterrupt:
        from cml_dist.run.folder import RunFolder, steps_in

        if not steps_in(RunFolder(config.run.dir).checkpoints):
            raise
        console.warn("Interrupted; the last checkpoint is whole, and the same command resumes from it")
        code = _exit_code(STOPPED_BY_USER)
        this_heartbeat().fail("it was interrupted", everywhere=True, stop_code=code)
    interrupts.ignore_signals()
    return code


def _exit_code(code: int) -> int:
    """Of a run that was asked to stop, which is not finished: a script that goes on with `&&` must be able to tell.

    But a launcher that may restart its processes takes any code but 0 for a fault, and would start the run again.
    """
    return 0 if restarts()[1] > 0 else code
