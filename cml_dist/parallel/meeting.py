"""How the processes of a world meet: through the launcher's store, and in the watch before any process group exists."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from cml_dist.config.schema import ParallelConfig
from cml_dist.errors import NetworkError, WorldError
from cml_dist.parallel.ending import end_process
from cml_dist.parallel.launched import Launched, launched
from cml_dist.parallel.star import Follower, Leader
from cml_dist.parallel.verdict import Member, Verdict
from cml_dist.parallel.watch import Joined
from cml_dist.parallel.wire import Wire

KEY = "cml_dist/watch"
RETRY_S = 0.5
ANSWER_S = 5.0
REACH = (
    "see whether rank 0's process runs there, whether MASTER_ADDR and MASTER_PORT are the same everywhere, and whether "
    "a firewall is in between"
)
MARGIN_S = 15.0
"""Rank 0 names who is missing; the others wait this much longer for it to."""


def meet(config: ParallelConfig) -> tuple[Joined, Store]:
    """Find the other processes that the launcher started, and watch each other from now on.

    Returns:
        (the watch, a store that no other start of a world has written to).

    Raises:
        NetworkError: the rendezvous, or rank 0's watch, cannot be reached.
        WorldError: the launcher's variables are missing, or ranks do not come within ``parallel.join_timeout_s``.

    Collective: all ranks.
    """
    here = launched()
    until_s = time.monotonic() + config.join_timeout_s
    store = launcher_store(here, config.join_timeout_s)
    address = "127.0.0.1" if here.local_size == here.size else here.host
    watch = join(store, identity(here.rank), here.size, config, until_s, address)
    # A store outlives its ranks when the launcher starts them again: what they have written may not be read.
    store.set_timeout(group_timeout(config))
    return watch, PrefixStore(watch.meeting, store)


def launcher_store(here: Launched, timeout_s: float) -> TCPStore:
    """Where the launcher says that the ranks meet; who else has come is not waited for.

    Raises:
        NetworkError: nobody listens there.
    """
    # The launcher's agent on rank 0's machine serves the store; without one rank 0 does.
    serves = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"the rendezvous at {here.host}:{here.port}"
    if not serves:
        _await_listener(here, where, timeout_s)
    try:
        return TCPStore(
            here.host,
            here.port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (DistError, RuntimeError, ValueError) as error:
        what = "serve" if serves else "use"
        raise NetworkError(f"{socket.gethostname()} cannot {what} {where}: {_first_line(error)}", REACH) from error


def _await_listener(here: Launched, where: str, timeout_s: float) -> None:
    """One line where nobody listens, instead of torch's pages.

    Raises:
        NetworkError: nobody does within ``timeout_s``.
    """
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((here.host, here.port), timeout=min(ANSWER_S, timeout_s)).close()
            return
        except OSError as error:
            if time.monotonic() + RETRY_S > until_s:
                why = error.strerror or error
                raise NetworkError(
                    f"{socket.gethostname()} did not reach {where} within {timeout_s:.0f} s: {why}", REACH
                ) from error
        time.sleep(RETRY_S)


def group_timeout(config: ParallelConfig) -> timedelta:
    """Of torch's own collectives: the watch knows more, and speaks first."""
    return timedelta(seconds=2 * config.timeout_s + 30)


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


def join(
    store: Store,
    me: Member,
    size: int,
    config: ParallelConfig,
    until_s: float,
    address: str,
    end: Callable[[Verdict, Joined, bool], None] = end_process,
) -> Joined:
    """This rank's watch, once all are there.

    Args:
        until_s: when to give up, by the monotonic clock.
        address: of rank 0's machine.
        end: see :class:`Joined`.

    Raises:
        NetworkError: rank 0 cannot be reached, or lets nobody in.
        WorldError: not all came.
    """
    limits = {"silence_s": config.silence_s, "timeout_s": config.timeout_s, "end": end}
    watch: Joined
    if me.rank == 0:
        server, token, countersign = _listen(address), secrets.token_hex(16), secrets.token_hex(16)
        seconds = until_s - time.monotonic()
        watch = Leader(me, size, server, token, countersign, seconds, **limits)
        watch.start()
        # The host's own name too: MASTER_ADDR may be that of an interface which others do not reach.
        addresses = [address] if address == "127.0.0.1" else [address, socket.gethostname()]
        meeting = {"addresses": addresses, "port": server.getsockname()[1], "token": token, "countersign": countersign}
        store.set(KEY, json.dumps(meeting))
    else:
        leader, wire = _find_leader(store, me, size, until_s)
        watch = Follower(me, size, leader, wire, **limits)
        watch.start()
    try:
        watch.await_all(until_s - time.monotonic() + MARGIN_S)
    except WorldError:
        raise
    except BaseException:  # Ctrl-C, a scheduler's signal
        watch.fail("it was stopped while the world met", everywhere=True)
        raise
    return watch


def _listen(address: str) -> socket.socket:
    """On this machine alone where all ranks are on it; otherwise on all its interfaces, at a free port."""
    if address == "127.0.0.1":
        return socket.create_server((address, 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # the kernel may have IPv6 switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


def _find_leader(store: Store, me: Member, size: int, until_s: float) -> tuple[Member, Wire]:
    """Be let in by rank 0. What the store says may be of an earlier start, whose rank 0 is gone: ask again."""
    why = "it published no address"
    while (left_s := until_s - time.monotonic()) > 0:
        try:
            store.wait([KEY], timedelta(seconds=left_s))
            meeting = json.loads(store.get(KEY))
        except (DistError, RuntimeError) as error:
            if time.monotonic() < until_s:
                why = _first_line(error)
            break
        for address in meeting["addresses"]:
            try:
                return _knock(address, meeting, me, size)
            except (OSError, ValueError) as error:
                why = f"{address}:{meeting['port']}: {error}"
        time.sleep(RETRY_S)
    raise NetworkError(
        f"rank 0 did not let in this process on host {me.host}: {why}",
        "see what rank 0 says, and whether its machine lets connections in",
    )


def _knock(address: str, meeting: dict, me: Member, size: int) -> tuple[Member, Wire]:
    """Connect, show the token, and see that it is rank 0 who answers.

    Raises:
        OSError, ValueError: it is not, or it refuses.
    """
    connection = socket.create_connection((address, meeting["port"]), timeout=ANSWER_S)
    wire = Wire(connection)
    try:
        wire.write({"token": meeting["token"], "member": vars(me), "size": size})
        answer = wire.await_one(ANSWER_S)
        if answer.get("welcome") != meeting["countersign"]:
            raise ValueError(answer.get("refused", "another program answers"))
        return Member(**answer["leader"]), wire
    except BaseException:
        wire.close()
        raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
