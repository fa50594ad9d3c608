"""How the watch ends a process whose main thread may hold any lock, or hang: nothing here waits for it."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from cml_dist.parallel.verdict import AGAIN, Member, Verdict

if TYPE_CHECKING:
    from cml_dist.parallel.watch import Joined, Watch

STDERR = 2
PATIENCE_S = 2.0
LAST_WORDS_S = 5.0
"""A file system that hangs holds up the last words, but not the end."""

LINGER_S = 1.5
"""Of who speaks in rank 0's place: the other ranks of the machine look whether it lives, and speak if not."""


def end_process(verdict: Verdict, watch: Joined, speaks: bool) -> None:
    """Say why, show stacks where they help, end who cannot end by itself, and leave: with exit code 1, or as asked to.

    Args:
        speaks: whether this rank is the one that puts the line on the screen.
    """
    faulthandler.dump_traceback_later(LAST_WORDS_S, exit=True, file=STDERR)
    for machine, pid in verdict.stopped:
        if machine == watch.me.machine and pid != os.getpid():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    kind = "error" if verdict.stop_code is None else "warning"
    line = f"{kind}: {verdict.what}; {_remedy(verdict)}".rstrip("; ") + "\n"
    if speaks:
        # A live display may have hidden the cursor, and left it in the middle of a line.
        _write(STDERR, "\x1b[?25h\n" + line if os.isatty(STDERR) else line)
    log = _descriptor(watch.log)
    if log is not None:
        _write(log, line)
    if verdict.stacks:
        _write(STDERR if log is None else log, f"{watch.described}; its threads:\n{_stacks()}")
    with suppress(Exception):
        watch.at_end(verdict)
    if speaks and 0 in verdict.ranks:
        time.sleep(LINGER_S)
    os._exit(1 if verdict.stop_code is None else verdict.stop_code)


def outlast_the_launcher(watch: Watch) -> None:
    """Take SIGTERM with some patience: a launcher that sees one rank die sends it to the others at once.

    Before they obey, the watch says which one it was. Call it in the main thread.
    """

    def obey(number: int, frame: FrameType | None) -> None:
        watch.await_verdict(PATIENCE_S)
        watch.fail("it was told to end (SIGTERM)", everywhere=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, obey)


def guard(log: TextIO | None, seconds: float, leave: bool) -> None:
    """Unless called again within ``seconds``, show this process's stacks, from a thread that needs no lock of Python's.

    Time in which the process as a whole is stopped (a suspended job) counts: nobody is there then to call again.

    Args:
        log: where to; None: stderr.
        seconds: 0: never.
        leave: end the process then.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=leave, file=_descriptor(log) or STDERR)
    else:
        faulthandler.cancel_dump_traceback_later()


def is_alive(member: Member) -> bool:
    """Whether a process of this machine runs: neither gone nor waiting to be buried."""
    try:
        with open(f"/proc/{member.pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def restarts() -> tuple[int, int]:
    """How often the launcher has started this world again in place, and how often it may."""
    count, most = (os.environ.get(f"TORCHELASTIC_{name}") or 0 for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return int(count), int(most)


def _remedy(verdict: Verdict) -> str:
    """With what a launcher that restarts in place does by itself."""
    restart, most = restarts()
    if restart >= most:
        return verdict.remedy
    starts = f"the launcher starts all again from the last checkpoint (restart {restart + 1} of {most})"
    return verdict.remedy.replace(AGAIN, starts)


def _descriptor(log: TextIO | None) -> int | None:
    if log is None:
        return None
    try:
        return log.fileno()
    except (OSError, ValueError):  # closed, or no file
        return None


def _write(descriptor: int, text: str) -> None:
    """Past Python's buffers, whose locks the main thread may hold."""
    data = text.encode(errors="backslashreplace")
    with suppress(OSError):
        while data:
            data = data[os.write(descriptor, data) :]


def _stacks() -> str:
    """Of all threads of this process; in one piece, so that ranks that share a file do not mix theirs."""
    file = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(file, all_threads=True)
        return os.pread(file, 2**20, 0).decode(errors="replace")
    finally:
        os.close(file)
