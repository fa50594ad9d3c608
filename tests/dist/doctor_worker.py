"""The doctor on a real process with one fault built in, chosen by FAULT, on rank 1: what a broken machine would do."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys

from cml_dist.cli import command
from cml_dist.tools.doctor import checks, examine

FAULT, RANK = os.environ.get("FAULT", ""), int(os.environ.get("RANK", 0))
SLOW = ("second derivative", "data")
examine.IN_THE_WORLD = {name: check for name, check in examine.IN_THE_WORLD.items() if name not in SLOW}


def _killed(case):
    os.kill(os.getpid(), signal.SIGKILL)


if FAULT == "killed" and RANK == 1:
    examine.IN_THE_WORLD = {"killed": _killed}
if FAULT == "deviant":
    checks.APPEAR_S = 1.0
if FAULT == "deviant" and RANK == 1:
    os.chdir(os.environ["ELSEWHERE"])  # a relative run.dir is another folder there
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "2.6.1" if name == "torch" else version(name)
sys.exit(command())
