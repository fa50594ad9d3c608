"""The doctor on a real process with one fault built in, chosen by FAULT, on rank 1: what a broken machine would do."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import time

from cml_dist.cli import main
from cml_dist.doctor import examine, ring, shared_folder, together

FAULT, RANK = os.environ.get("FAULT", ""), int(os.environ.get("RANK", 0))
SLOW = ("DeepSpeed", "second derivative", "data")
examine.CHECKS = tuple(check for check in examine.CHECKS if check.name not in SLOW)

if FAULT == "absent":
    together.JOIN_S = 6.0
    if RANK == 1:
        time.sleep(30)  # the launcher sees nothing amiss
        sys.exit(0)
if FAULT == "hang":
    together.RING_S = 4.0
    if RANK == 1:
        ring._reduce = lambda world: time.sleep(600)
if FAULT == "killed" and RANK == 1:
    ring._reduce = lambda world: os.kill(os.getpid(), signal.SIGKILL)
if FAULT == "deviant":
    shared_folder.APPEAR_S = 1.0
if FAULT == "deviant" and RANK == 1:
    os.chdir(os.environ["ELSEWHERE"])  # a relative run.dir is another folder there
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "2.6.1" if name == "torch" else version(name)
sys.exit(main())
