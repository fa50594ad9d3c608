"""``cml-dist launch local``: a command in several processes of this machine, by ``accelerate launch``.

This process only waits: it answers signals at once, and hands them on to the ranks, which save. The launcher hears of
none, since it would kill its ranks 30 s later.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from cml_dist.config.launcher import launcher_variables
from cml_dist.config.load import load_config
from cml_dist.distributed.env import LAUNCHED_LOCALLY
from cml_dist.distributed.exit import signal_when_parent_ends
from cml_dist.errors import ConfigError
from cml_dist.run.interrupts import STOPPED_BY_USER
from cml_dist.tools.launch_files import accelerate_file, check_run

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAID = {
    "train.train": "the processes stop and save once their meta-step or episode is done",
    "finished.evaluate": "the processes stop once their episode is done; nothing is written",
    "analyse.analyse": "the processes stop; what is finished of a checkpoint is kept",
    "doctor.doctor": "the processes stop",
}
"""Commands that several processes can run, and what a first signal does to them."""

TICK_S = 0.5
"""Between two times that ranks are told of a signal: one may just be starting."""


def launch_here(asked: argparse.Namespace, inner: argparse.Namespace, say: Callable[[str], object]) -> int:
    """Check what the command would be refused for, run it, and return its exit code.

    Args:
        asked: ``processes``; ``config``: a name of ``launch/accelerate``, or a path; ``words``: the command.
        inner: the parsed words.

    Raises:
        ConfigError, CheckpointError: see :func:`check_run`.
    """
    if inner.command not in SAID:
        what = f"{shlex.join(asked.words)} is a command of one process"
        raise ConfigError(what, "run it by itself; here train, pretrain, eval, analyse and doctor are run")
    file, words = accelerate_file(asked.config, "--config", may_be_path=True), list(asked.words)
    variables = launcher_variables(file)
    if inner.command == "train.train":
        config = load_config(inner.config, inner.overrides, say, inner.preset)
        if variables.get("ACCELERATE_USE_CPU", "").lower() == "true" and config.run.device == "auto":
            words.append("run.device=cpu")  # which accelerate launch would not hand on
        check_run(config, asked.processes, file)
        words.append(f"parallel.processes={asked.processes}")  # refused where the file brings up fewer
    options = {"config_file": file, "num_processes": asked.processes, "num_machines": 1, "machine_rank": 0}
    launcher = [f"--{name}={value}" for name, value in {**options, "main_process_port": 0}.items()]
    again = shlex.join(["cml-dist", "launch", "local", f"--processes={asked.processes}", f"--config={asked.config}"])
    started = f"Starting {asked.processes} process{'es' * (asked.processes != 1)} by accelerate launch ({file.stem})"
    command = [*launcher, "-m", "cml_dist", *words]
    return _watch(command, lambda: say(started), SAID[inner.command], f"{again} -- {shlex.join(asked.words)}")


@contextmanager
def heard(first: str, numbers: Sequence[int] = PASSED_ON) -> Iterator[list[int]]:
    """The signals that come meanwhile, each said on the screen; ``first``: what it does but for a second Ctrl-C."""
    came: list[int] = []

    def hear(number: int, frame: object) -> None:
        came.append(number)
        second = came.count(signal.SIGINT) > 1
        what = "ended at once" if second else first
        hint = "" if second or number != signal.SIGINT else "; Ctrl-C again ends them at once"
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        with suppress(OSError):  # nobody may read it any more
            os.write(2, f"\n{name}: {what}{hint}\n".encode())

    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(arguments: Sequence[str], starting: Callable[[], object], first: str, again: str) -> int:
    """``first``: what a first Ctrl-C does; ``again``: the command to go on with."""
    environment = {**os.environ, LAUNCHED_LOCALLY: "yes", "PET_SIGNALS_TO_HANDLE": "SIGQUIT"}
    command = [sys.executable, "-m", "cml_dist.tools.local", *arguments]
    with heard(first) as came:
        starting()
        # A session of its own, which the terminal's Ctrl-C does not reach.
        launcher = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_hear_nothing
        )
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = launcher.wait(TICK_S)
                break
            if came:
                _tell(psutil.Process(launcher.pid), came)
    if came and code != 0:
        print(f"To go on: {again}", file=sys.stderr)
        return STOPPED_BY_USER if signal.SIGINT in came else code
    return code


def _hear_nothing() -> None:
    """In the launcher, and in each rank until it says otherwise, signals are ignored; it dies with its parent."""
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN)
    signal_when_parent_ends(signal.SIGKILL)  # its ranks then hear of it, and save


def _tell(launcher: psutil.Process, came: Sequence[int]) -> None:
    """Hand the first signal on to the ranks; end all where there are none yet, or the user insists."""
    with suppress(psutil.NoSuchProcess):
        below = launcher.children(recursive=True)
        ranks = [process for process in below if "cml_dist" in process.cmdline() and process.ppid() == launcher.pid]
        if not ranks or came.count(signal.SIGINT) > 1:
            for process in (launcher, *below):
                process.kill()
        for process in ranks:
            process.send_signal(came[0] if came[0] != signal.SIGHUP else signal.SIGTERM)


def start_logged(
    words: Sequence[str], log: Path, environment: Mapping[str, str], cores: Collection[int], at_parents_end: int
) -> subprocess.Popen:
    """A command on these cores (empty: on all), with what it says at the end of ``log``.

    Args:
        at_parents_end: the signal that it gets should this process end before it.
    """

    def settle() -> None:
        signal_when_parent_ends(at_parents_end)
        if cores:
            os.sched_setaffinity(0, cores)

    with open(log, "ab") as file:
        how = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT, "preexec_fn": settle}
        return subprocess.Popen(words, env=environment, **how)


def _accelerate_launch() -> int:
    """``accelerate launch`` with the arguments of this process; returns the code of the rank that failed first.

    Its traceback and its logger say which process ended how, where the process itself has said why.
    """
    logging.disable(logging.ERROR)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args())
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say so itself
            print(f"error: rank {rank} (pid {failure.pid}) was killed by {failure.signal_name()}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except Exception as error:
        print(f"error: accelerate launch: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_accelerate_launch())
