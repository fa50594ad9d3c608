"""How a run stands, for other terminals and for batch scripts: ``status.json`` in the run folder. Imports no torch."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

State = Literal["running", "stopped", "finished", "failed"]


@dataclass(frozen=True)
class RunStatus:
    """What rank 0 wrote last.

    Attributes:
        state: ``running``; ``stopped``: asked to, everything is saved and the same command goes on; ``finished``;
            ``failed``. Of a killed process ``running`` stays.
        reason: of ``stopped`` and ``failed``, and of ``finished`` before the last step; else what it is doing.
        step, steps: meta-steps done, and of the whole run.
        time, started: of writing and of this start (ISO 8601, with the zone).
        host, pid: of rank 0.
        world: processes.
        method: what runs, as tables name it.
        job: the SLURM job, if there is one.
        restart: how often the job was requeued, and the launcher started the processes again since.
        starts: how often this run was started, this time included.
        exit_s: seconds that a safe exit takes at most, as far as seen: the longest meta-step and two of the longest
            saves, one of which may just have begun; None before there was one of each.
    """

    state: State
    reason: str
    step: Annotated[int, Field(ge=0, lt=2**53)]
    steps: Annotated[int, Field(ge=1, lt=2**53)]
    time: str
    started: str
    host: str
    pid: int
    world: int
    method: str = ""
    job: str | None = None
    restart: int = 0
    starts: int = 1
    exit_s: float | None = None

    def text(self) -> str:
        """The file's content."""
        return json.dumps(asdict(self), indent=2) + "\n"


def now() -> str:
    """The time as ``status.json`` has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def read_status(path: Path) -> RunStatus | None:
    """The status in a file; None where there is none, or nothing that can be read."""
    try:
        return TypeAdapter(RunStatus).validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
