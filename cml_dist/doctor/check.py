"""A check: what runs, where, and how long it may take. Nothing that happens in one keeps the others from running."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

from cml_dist.config.schema import RunConfig
from cml_dist.doctor.findings import Finding
from cml_dist.doctor.place import Place
from cml_dist.errors import CmlError

T = TypeVar("T")
POLL_S = 0.05


@dataclass
class Case:
    """What is examined, and what is known of it so far.

    Attributes:
        config: of the run that is to come; where none was named, a small one that only carries settings of the world.
        configured: whether one was named.
        run_dir: the run's folder.
        place: this process.
        hung: names of checks that did not end.
        at_end: is told why, where the world is lost while it is looked at.
    """

    config: RunConfig
    configured: bool
    run_dir: Path
    place: Place
    hung: list[str] = field(default_factory=list)
    at_end: Callable[[str], None] = lambda cause: None


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        group: heading under which its findings are shown.
        name: what is said where it fails itself.
        run: yields findings.
        where: ``rank``: every process; ``machine``: the first of each machine; ``main``: rank 0.
        limit_s: after this time it is given up.
    """

    group: str
    name: str
    run: Callable[[Case], Iterable[Finding]]
    where: Literal["rank", "machine", "main"] = "machine"
    limit_s: float = 60.0

    def concerns(self, place: Place) -> bool:
        return {"rank": True, "machine": place.local_rank == 0, "main": place.rank == 0}[self.where]


class Hung(Exception):
    """Something did not end in its time; the message says where it stands."""


def run_check(check: Check, case: Case) -> list[Finding]:
    """The findings of a check; its own failure, and not ending, are findings too."""
    found: list[Finding] = []

    def collect() -> None:
        for finding in check.run(case):
            found.append(replace(finding, group=check.group))

    try:
        in_time(collect, check.limit_s)
    except Hung as hung:
        case.hung.append(check.name)
        return [*found, replace(_did_not_end(check.name, str(hung)), group=check.group)]
    except Exception as error:
        return [*found, replace(failed(check.name, error), group=check.group)]
    return found


def in_time(work: Callable[[], T], limit_s: float, give_up: Callable[[], bool] | None = None) -> T:
    """Run ``work`` in a thread of its own, and wait no longer than ``limit_s``.

    A thread that does not end is left behind: whoever gets ``Hung`` must end the process by ``os._exit``.

    Args:
        give_up: asked now and then; True ends the waiting early.

    Raises:
        Hung: it did not end.
    """
    result: list[T] = []
    error: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as caught:  # handed to whoever waits
            error.append(caught)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    end = time.monotonic() + limit_s
    while thread.is_alive() and time.monotonic() < end:
        thread.join(POLL_S)
        if give_up is not None and thread.is_alive() and give_up():
            break
    if thread.is_alive():
        waited_s = limit_s - max(0.0, end - time.monotonic())
        raise Hung(f"did not end within {waited_s:.0f} s{_standing(sys._current_frames().get(thread.ident or 0))}")
    if error:
        raise error[0]
    return result[0]


def _standing(frame: FrameType | None) -> str:
    """Where a thread stands: its innermost line."""
    if frame is None:
        return ""
    last = traceback.extract_stack(frame)[-1]
    return f" (it stands in {last.name}, {os.path.basename(last.filename)} line {last.lineno})"


def failed(name: str, error: BaseException) -> Finding:
    """A check that raised: a known fault in its own words, all else with its type."""
    if isinstance(error, CmlError):
        return Finding(name, "fault", error.what, error.remedy)
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        return Finding(name, "fault", f"{named}{error.strerror}", "mend it, or choose another place")
    if isinstance(error, ModuleNotFoundError) and _is_missing(error.name):
        # The check of versions says what is wrong; here it is only in the way.
        return Finding(name, "warning", f"not looked at: {error.name} is not installed", "install it, and look again")
    said = " ".join(str(error).split())[:300]
    where: Any = traceback.extract_tb(error.__traceback__)
    at = f" ({os.path.basename(where[-1].filename)} line {where[-1].lineno})" if where else ""
    return Finding(
        name,
        "fault",
        f"{type(error).__name__}: {said}{at}",
        "a fault of this installation or of cml-dist: see its line",
    )


def _is_missing(module: str | None) -> bool:
    """Whether a package is not there at all, and not only a part of it."""
    try:
        return module is None or importlib.util.find_spec(module.partition(".")[0]) is None
    except ValueError:  # someone has put it out of the way
        return True


def _did_not_end(name: str, how: str) -> Finding:
    return Finding(name, "fault", how, "a run would hang here too: look at this device, file system or network first")
