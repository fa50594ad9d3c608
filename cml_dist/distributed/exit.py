"""How a process ends: by itself in a world of several, or by its heartbeat while the main thread hangs. No torch."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, TextIO

from cml_dist.distributed.env import launched_or_alone, launcher_adds_noise, restarts
from cml_dist.distributed.failure import AGAIN, Failure
from cml_dist.distributed.heartbeat import Heartbeat
from cml_dist.errors import WorldError

PR_SET_PDEATHSIG = 1
"""See prctl(2)."""

STDERR = 2
SIGTERM_PATIENCE_S = 5.0
"""In which the judge names the rank that a launcher saw die before it sent SIGTERM to the others."""

LAST_WORDS_S = 5.0
"""A file system that hangs holds up the last words, but not the end."""

LINGER_S = 1.5
"""Of who speaks in rank 0's place: the other ranks of the machine look whether it lives, and speak if not."""

_is_own = False
"""See :func:`own_process`."""


class BrokenOff(WorldError):
    """The heartbeat ended a call that hung, in a process that is its caller's."""

    everywhere = False

    def __init__(self) -> None:
        super().__init__("this call was broken off", "the line above says why")

    def __reduce__(self) -> tuple:
        return type(self), ()


def end_process(failure: Failure, heartbeat: Heartbeat, speaks: bool) -> None:
    """Say why, show stacks where they help, end who cannot end by itself, and leave: with exit code 1, or as asked to.

    Nothing here waits for the main thread, which may hold any lock, or hang. In a process that is a caller's, the call
    that hangs is broken off instead, and raises: by an exception in Python's code, and in a collective by an end of the
    connections that were made since the ranks met.

    Args:
        speaks: whether this rank is the one that puts the line on the screen.
    """
    if _is_own:
        faulthandler.dump_traceback_later(LAST_WORDS_S, exit=True, file=STDERR)
    for machine, pid in failure.stopped:
        if machine == heartbeat.machine and pid != os.getpid():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    kind = "error" if failure.stop_code is None else "warning"
    line = f"{kind}: {failure.what}; {_remedy(failure)}".rstrip("; ") + f"{launcher_adds_noise()}\n"
    if speaks:
        # A live display may have hidden the cursor, and left it in the middle of a line.
        _write(STDERR, "\x1b[?25h\n" + line if os.isatty(STDERR) else line)
    log = _descriptor(heartbeat.log)
    if log is not None:
        _write(log, line)
    if failure.stacks:
        _write(STDERR if log is None else log, f"{heartbeat.described}; its threads:\n{_stacks()}")
    with suppress(Exception):
        heartbeat.at_end(failure)
    if speaks and 0 in failure.ranks:
        time.sleep(LINGER_S)
    if _is_own:
        os._exit(1 if failure.stop_code is None else failure.stop_code)
    main_thread = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main_thread, ctypes.py_object(BrokenOff))
    if heartbeat.met:
        for connection in tcp_connections():  # a collective that waits for another rank raises then (gloo)
            if ends_of(connection) not in heartbeat.connected_before:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def tcp_connections() -> Iterator[socket.socket]:
    """Every TCP connection of this process, by a descriptor of its own that is closed again."""
    for descriptor in map(int, os.listdir("/dev/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # closed meanwhile
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and ends_of(connection) is not None:
                yield connection


def ends_of(connection: socket.socket) -> tuple[Any, Any] | None:
    """The addresses of a connection's two ends; None: it is not connected."""
    try:
        return connection.getsockname(), connection.getpeername()
    except OSError:
        return None


def own_process() -> None:
    """Say that this process is the command's own, as ``cml-dist`` and ``python -m cml_dist`` are."""
    global _is_own
    _is_own = True


def leave(code: int) -> int:
    """End at once in a world of several processes; in a world of one, return ``code``. For the command's own process.

    After a fault the others may never come, and a process group that is torn down in order would wait for them. After
    success, torch's gloo threads that a DDP module still holds abort the interpreter while it goes down ("terminate
    called without an active exception", about one exit in five on a busy machine), and the launcher would report a
    finished run as a failed one. Everything that matters is closed or synced by then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if launched_or_alone().size > 1:
        os._exit(code)
    return code


def name_failure_before_sigterm(heartbeat: Heartbeat) -> None:
    """Take SIGTERM with some patience: a launcher that sees one rank die sends it to the others at once.

    Before they obey, the heartbeat says which one it was. Call it in the main thread.
    """

    def obey(number: int, frame: FrameType | None) -> None:
        heartbeat.await_failure(SIGTERM_PATIENCE_S)
        heartbeat.fail("it was told to end (SIGTERM)", everywhere=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, obey)


def signal_when_parent_ends(number: int) -> None:
    """Have the kernel send this process a signal once the thread that made it has ended (Linux alone)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def show_stack_unless_called_again(log: TextIO | None, seconds: float) -> None:
    """Show the main thread's stack after ``seconds`` (0: never), by a handler of SIGALRM that needs no lock.

    Time in which the process as a whole is suspended counts too: it shows the stack then, and goes on. Hence no thread
    of ``faulthandler.dump_traceback_later``, which reads the frames of threads that run, and crashes now and then. In a
    process that is a caller's the alarm is the caller's.

    Args:
        log: where to; None: stderr.
    """
    if _is_own:
        faulthandler.register(signal.SIGALRM, file=_descriptor(log) or STDERR, all_threads=False)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _remedy(failure: Failure) -> str:
    """With what a launcher that restarts in place does by itself."""
    restart, most = restarts()
    if restart >= most:
        return failure.remedy
    starts = f"the launcher starts all again from the last checkpoint (restart {restart + 1} of {most})"
    return failure.remedy.replace(AGAIN, starts)


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
