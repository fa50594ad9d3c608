"""A process on its way to the meeting: the others notice where it dies, before any library is imported.

Imports take seconds, and minutes on a cold network file system; the launcher's store can be read only after torch's.
So rank 0 also listens, from the first moment, at a port that the launcher's variables tell (:func:`early_port`). Who
finds it is watched from there on; where something stands in between, the ranks find each other through the store
(:mod:`cml_dist.parallel.meeting`), and only then notice who died. No torch here.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  of host names: a thread that imports it later waits for the main thread's imports
import hashlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from cml_dist.config.schema import ParallelConfig
from cml_dist.parallel.ending import end_process
from cml_dist.parallel.launched import Launched, check_launch
from cml_dist.parallel.star import CUT_S, Follower, Leader
from cml_dist.parallel.verdict import Member, Verdict
from cml_dist.parallel.watch import Joined, Watch, keep_watch
from cml_dist.parallel.wire import Wire

RETRY_S = 0.5
CONNECT_S = 2.0
"""Of an early attempt: nobody waits longer at the meeting for a firewall that swallows it."""

EARLY_PORTS = (61000, 65500)
"""Above the range from which Linux gives out ports by itself."""


def early_port(here: Launched) -> int:
    """Where rank 0 listens from its first moment: worlds beside each other on a machine have ports of their own."""
    first, end = EARLY_PORTS
    return first + here.port % (end - first)


def world_word(here: Launched) -> str:
    """What the processes of a world know alike, and hardly another has.

    A restart in place has the same: torchrun on several machines counts it only where the fault was.
    """
    names = ["TORCHELASTIC_RUN_ID", *(f"SLURM_{name}" for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))]
    facts = (here.host, here.port, here.size, *(os.environ.get(name) for name in names))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def identity(rank: int) -> Member:
    """This process, as the others shall know it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            kernel = file.read().strip()
        machine = f"{kernel}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        machine = socket.gethostname()
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return Member(rank, name, os.getpid(), machine, moved_s=time.monotonic())


class Arriving(Watch):
    """This process's watch until all ranks have met.

    Args:
        me: this rank.
        size: of the world.
        config: its limits.
        address: of rank 0's machine.
        port: where rank 0 listens from its first moment; 0: nowhere that can be known before the meeting.
        word: see :func:`world_word`.
        end: see :class:`Joined`.

    Attributes:
        joined: the watch among those that came; None: rank 0 is not found yet.
        meeting: rank 0's, which it tells the others through the store.
    """

    def __init__(
        self,
        me: Member,
        size: int,
        config: ParallelConfig,
        address: str,
        port: int,
        word: str,
        end: Callable[[Verdict, Joined, bool], None] = end_process,
    ) -> None:
        super().__init__()
        self.me, self.size, self._word = me, size, word
        self.joined: Joined | None = None
        self.meeting: dict = {}
        self._limits = {"silence_s": config.silence_s, "timeout_s": config.timeout_s, "end": end}
        self._at_meeting = threading.Event()
        self._thread: threading.Thread | None = None
        if me.rank == 0:
            self._receive(address, port)
        elif port:
            self._thread = threading.Thread(target=self._look_for_rank_0, args=(address, port), daemon=True)
            self._thread.start()

    def fail(self, cause: str, *, everywhere: bool = False, stop_code: int | None = None) -> None:
        self.stop_looking()
        if self.joined is not None:
            self.joined.fail(cause, everywhere=everywhere, stop_code=stop_code)

    def blame(self, error: BaseException) -> None:
        if self.joined is not None:
            self.joined.blame(error)

    def stop_looking(self) -> None:
        """From now on ``joined`` changes by :meth:`enter` alone."""
        self._at_meeting.set()
        if self._thread is not None:
            self._thread.join()

    def enter(self, leader: Member, wire: Wire) -> Joined:
        """Tell rank 0, which has let this rank in at ``wire``, that it is here, and watch each other from now on."""
        wire.write({"here": True})
        self.joined = Follower(self.me, self.size, leader, wire, **self._limits)
        self.joined.start()
        return self.joined

    def knock(
        self, address: str, port: int, token: str, connect_s: float, goes_on: Callable[[], bool]
    ) -> tuple[Wire, dict]:
        """Connect, show the token, and wait for an answer.

        Returns:
            (the connection, the answer): the caller looks whether it is rank 0's, and then may :meth:`enter`.

        Raises:
            OSError, ValueError: nobody answers as long as ``goes_on()``, or rank 0 refuses.
        """
        connection = socket.create_connection((address, port), timeout=connect_s)
        wire = Wire(connection, lost_s=self._limits["silence_s"] + CUT_S)
        try:
            wire.write({"token": token, "member": vars(self.me), "size": self.size})
            while (answer := wire.await_one(RETRY_S)) is None:
                if not wire.open or not goes_on():
                    raise OSError("no answer")
            if "refused" in answer:
                raise ValueError(answer["refused"])
            return wire, answer
        except BaseException:
            wire.close()
            raise

    def _receive(self, address: str, port: int) -> None:
        """Rank 0: listen for the others."""
        server, token, countersign = _listen(address, port), secrets.token_hex(16), secrets.token_hex(16)
        self.joined = Leader(self.me, self.size, server, (token, self._word), countersign, **self._limits)
        self.joined.start()
        # The host's own name too: MASTER_ADDR may be that of an interface which others do not reach.
        addresses = [address] if address == "127.0.0.1" else [address, socket.gethostname()]
        at = {"addresses": addresses, "port": server.getsockname()[1]}
        self.meeting = {**at, "token": token, "countersign": countersign}

    def _look_for_rank_0(self, address: str, port: int) -> None:
        while not self._at_meeting.is_set():
            with suppress(OSError, ValueError, TypeError, KeyError):
                # Rank 0 may be slow to answer: an import can hold Python's lock for long.
                wire, answer = self.knock(address, port, self._word, CONNECT_S, lambda: not self._at_meeting.is_set())
                if answer.get("word") == self._word:
                    self.enter(Member(**answer["leader"]), wire)
                    return
                wire.close()  # of another world
            self._at_meeting.wait(RETRY_S)


def arrive(config: ParallelConfig) -> Arriving | None:
    """Have the other processes of a world of several notice from now on where this one dies.

    Returns:
        The watch of this process from now on; None: it is alone.

    Raises:
        WorldError: the launcher's variables are missing, or not those of the world that was asked for.
    """
    here = check_launch(config.processes)
    if here.size == 1:
        return None
    address = "127.0.0.1" if here.local_size == here.size else here.host
    watch = Arriving(identity(here.rank), here.size, config, address, early_port(here), world_word(here))
    keep_watch(watch)
    return watch


def _listen(address: str, port: int) -> socket.socket:
    """On this machine alone where all ranks are on it; else on all its interfaces. At another port if this is taken."""
    for wanted in (port, 0):
        with suppress(OSError):
            if address == "127.0.0.1":
                return socket.create_server((address, wanted), backlog=1024)
            if socket.has_dualstack_ipv6():
                with suppress(OSError):  # the kernel may have IPv6 switched off
                    return socket.create_server(("", wanted), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            return socket.create_server(("", wanted), backlog=1024)
    return socket.create_server(("", 0), backlog=1024)
