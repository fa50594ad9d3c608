"""The order of an examination.

Who is there (by ``board.py``: plain TCP) -> joining the world as a run would -> the ring -> clocks -> the shared
folder -> every process's own checks -> all findings to rank 0. Each step has a time limit on every rank, and each says
what it found even where the one before it failed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from cml_dist.config.load import merge as merge_settings
from cml_dist.config.load import parse_config
from cml_dist.config.schema import RunConfig
from cml_dist.doctor import together
from cml_dist.doctor.board import Board
from cml_dist.doctor.check import Case, Check, Hung, failed, in_time, run_check
from cml_dist.doctor.findings import Finding, Row, merge, names
from cml_dist.doctor.gpus import check_gpus, check_own_gpu
from cml_dist.doctor.machine import check_cores, check_limits, check_memory, check_shared_memory
from cml_dist.doctor.model import check_backbone, check_data
from cml_dist.doctor.place import Place, place_of
from cml_dist.doctor.report import Report
from cml_dist.doctor.slurm import check_slurm
from cml_dist.doctor.storage import check_run_folder, check_temporary_folder
from cml_dist.doctor.together import GRACE_S, STORAGE, WORLD, look_together
from cml_dist.doctor.versions import check_deepspeed, check_torch, check_trackers, check_versions
from cml_dist.errors import WorldError
from cml_dist.parallel.watch import this_watch

VERSIONS, MACHINE, MODEL = "versions", "machine", "model and data"
GROUPS = (VERSIONS, MACHINE, WORLD, MODEL, STORAGE)
"""Headings, in the order in which they are shown."""

CHECKS = (
    Check(VERSIONS, "versions", check_versions, "rank"),
    Check(VERSIONS, "torch build", check_torch, "rank"),
    Check(VERSIONS, "DeepSpeed", check_deepspeed, limit_s=120),
    Check(VERSIONS, "trackers", check_trackers, "main"),
    Check(MACHINE, "GPUs", check_gpus, limit_s=120),
    Check(MACHINE, "GPU", check_own_gpu, "rank", limit_s=120),
    Check(MACHINE, "CPU cores", check_cores, "rank"),
    Check(MACHINE, "memory", check_memory),
    Check(MACHINE, "shared memory", check_shared_memory),
    Check(MACHINE, "limits", check_limits, "rank"),
    Check(WORLD, "SLURM", check_slurm, "main"),
    Check(MODEL, "second derivative", check_backbone, limit_s=600),
    Check(MODEL, "data", check_data, limit_s=300),
    Check(STORAGE, "run folder", check_run_folder, "main"),
    Check(STORAGE, "temporary folder", check_temporary_folder),
)
"""What each process looks at by itself."""

NOT_CONFIGURED = {"domain": {"name": "sinusoid"}, "model": {"backbone": "mlp"}}
"""Where no configuration is named: its domain and model are not looked at."""


def bare_config(overrides: Sequence[str] = ()) -> RunConfig:
    """A configuration that carries nothing but the settings of a world."""
    return parse_config(merge_settings(NOT_CONFIGURED, overrides), source="the command line")


class _ToldToEnd(BaseException):
    """SIGTERM: a launcher that has lost another process, or a scheduler."""


class Examination:
    """One look at this process's machine, and with all others at the world.

    Args:
        config: of the run that is to come, or :func:`bare_config`.
        configuration: its name; None where none was given.
        run_dir: the folder to look at.
        present: shows the report; called on rank 0 alone.
        progress: called as ``progress(steps done, the next one)``; there are :func:`num_steps`.
    """

    def __init__(
        self,
        config: RunConfig,
        configuration: str | None,
        run_dir: str,
        present: Callable[[Report], None],
        progress: Callable[[int, str], None] = lambda done, step: None,
    ) -> None:
        self.case = Case(config, configuration is not None, Path(run_dir), place_of())
        self._configuration, self._present = configuration, present
        self._found: list[Finding] = []
        self._places = {self.case.place.rank: self.case.place}
        self._started = time.monotonic()
        self._cut = threading.Lock()
        done = iter(range(num_steps()))
        self._begin: Callable[[str], None] = lambda step: progress(next(done), step)

    @property
    def hung(self) -> bool:
        """Whether a thread hangs still, so that the process must be ended by ``os._exit``."""
        return bool(self.case.hung)

    def run(self) -> int:
        """Look at everything; returns the exit code, on every rank that of the world.

        Raises:
            WorldError: this rank did not find the others.

        Collective: all ranks, which need not all come.
        """
        before = signal.getsignal(signal.SIGTERM)
        alone = threading.current_thread() is not threading.main_thread()
        if not alone:
            signal.signal(signal.SIGTERM, _tell)
        try:
            return self._run()
        except _ToldToEnd:
            # A launcher stops all when one dies: the watch knows which one, and then ends this process.
            this_watch().await_verdict(2.0)
            self.cut_short("this process was told to end (SIGTERM)")
            return 1
        finally:
            if not alone:
                signal.signal(signal.SIGTERM, before)

    def cut_short(self, cause: str) -> None:
        """The world is lost: rank 0 shows what is known so far. The first call counts."""
        if self.case.place.rank == 0 and self._cut.acquire(blocking=False):
            remedy = "see that process's own output, and start the doctor again"
            fault = Finding("world", "fault", f"{cause}; the rest was not looked at", remedy, group=WORLD)
            self._present(self._report({0: [*self._found, fault]}))

    def _run(self) -> int:
        case, place = self.case, self.case.place
        self._begin("meeting")
        board = self._meet()
        if board is not None:
            case.at_end = self.cut_short
            look_together(case, board, self._places, self._found, self._begin)
        for check in CHECKS:
            if check.concerns(place):
                self._begin(check.name)
                self._found += run_check(check, case)
        if board is None:
            if place.rank == 0:
                self._present(self._report({0: self._found}))
            return 1
        if place.rank != 0:
            board.say("found", [finding.as_dict() for finding in self._found])
            code = _verdict_of_main(board)
            board.say("bye")
            return code
        heard = _hear_findings(board, self._places, self._found)
        report = self._report(heard)
        self._present(report)
        board.say("verdict", report.exit_code)
        board.hear_all("bye", [rank for rank in heard if rank != 0], GRACE_S)  # the store may be this process's own
        return report.exit_code

    def _meet(self) -> Board | None:
        """Where all leave word, once it is known who came; None where torch itself is missing."""
        place = self.case.place
        try:
            board = in_time(lambda: Board.open(place, together.JOIN_S), 2 * together.JOIN_S)
        except Hung as hung:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}, where rank 0 is said to be"
            raise _own(f"reaching {where}, {hung}", "see whether rank 0 runs there, and the port is open") from hung
        except WorldError as error:
            raise _own(error.what, error.remedy) from error
        except Exception as error:  # torch itself is missing or broken
            fault = failed("world", error)
            if place.rank != 0:
                raise _own(f"{fault.value} on {place.host}", fault.remedy) from error
            self._found.append(replace(fault, group=WORLD))
            return None
        board.say("here", place.as_dict())
        if place.rank == 0:
            words = board.hear_all("here", range(place.size), together.JOIN_S)
            board.say("roll", sorted(words))
            self._places = {rank: Place(**word) for rank, word in sorted(words.items())}
            return board
        try:
            roll = board.hear("roll", 0, 2 * together.JOIN_S + GRACE_S)
        except TimeoutError as error:
            raise _own(f"{place.host} waited for rank 0 in vain: {error}", "see what rank 0 says") from error
        self._places = {rank: Place(**board.hear("here", rank, GRACE_S)) for rank in roll}
        return board

    def _report(self, heard: dict[int, list[Finding]]) -> Report:
        rows: list[Row] = sorted(merge(heard, self._places), key=lambda row: GROUPS.index(row.group))
        folder, seconds = os.fspath(self.case.run_dir), time.monotonic() - self._started
        return Report(tuple(rows), self._places, folder, self._configuration, seconds)


def _own(what: str, remedy: str) -> WorldError:
    """An error that this rank alone may know of."""
    error = WorldError(what, remedy)
    error.everywhere = False
    return error


def _tell(number: int, frame: FrameType | None) -> None:
    raise _ToldToEnd


def num_steps() -> int:
    """Steps of this process's examination."""
    place = place_of()
    of_several = len(together.TOGETHER) if place.size > 1 else 1
    return 1 + of_several + sum(check.concerns(place) for check in CHECKS)


# --------------------------------------------------------------------------- all findings on rank 0


def _hear_findings(board: Board, places: dict[int, Place], own: list[Finding]) -> dict[int, list[Finding]]:
    """The findings of all ranks; a rank that stays silent is a finding."""
    limit_s = max(check.limit_s for check in CHECKS) + GRACE_S
    words = board.hear_all("found", [rank for rank in places if rank != 0], limit_s)
    heard = {0: own, **{rank: [Finding(**word) for word in said] for rank, said in words.items()}}
    silent = [rank for rank in places if rank not in heard]
    if silent:
        heard[0] = [
            *own,
            Finding(
                "reports",
                "fault",
                f"nothing was heard of {names(silent, places)}",
                "see its own output: it died, or hangs",
                group=WORLD,
            ),
        ]
    return heard


def _verdict_of_main(board: Board) -> int:
    """The exit code that rank 0 decides on; 1 where it says nothing."""
    try:
        return int(board.hear("verdict", 0, sum(check.limit_s for check in CHECKS)))
    except TimeoutError:
        return 1
