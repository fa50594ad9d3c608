"""How the processes of a world find each other: through the launcher's store, then in one that rank 0 serves itself.

A store of a start's own holds nothing of an earlier start, breaks when rank 0 dies, and survives a launcher that is
killed while its ranks save.
"""

from __future__ import annotations

import ipaddress
import json
import multiprocessing
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from multiprocessing.pool import ThreadPool

import psutil
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from cml_dist.config.schema import ParallelConfig
from cml_dist.distributed import failure as failures
from cml_dist.distributed.env import Launched, host_name, launched, launcher_serves_store
from cml_dist.distributed.exit import ends_of, tcp_connections
from cml_dist.distributed.failure import Failure, Member
from cml_dist.distributed.rank_heartbeat import RankHeartbeat
from cml_dist.errors import NetworkError, WorldError

KEY = "cml_dist/store"
POLL_S = 0.2
CONNECT_S = 5.0
"""For one attempt: a program that takes a connection and says nothing would hold up torch's client for ever."""

MARGIN_S = 15.0
"""Rank 0 names who is missing; the others wait this much longer for it to."""

GROUP_TIMEOUT = timedelta(hours=24)
"""Of torch's own collectives, which count the time of a suspended job: the heartbeat judges what hangs."""

EARLIER_START = "rank 0 of an earlier start still listens there"
REACH = (
    "see whether rank 0's process runs there, whether MASTER_ADDR and MASTER_PORT are the same everywhere, and whether "
    "a firewall is in between"
)


def meet(config: ParallelConfig) -> tuple[RankHeartbeat, Store]:
    """Find the other processes that the launcher started; from now on each knows where the others are.

    Returns:
        (the heartbeat, a store for the process group).

    Raises:
        NetworkError: the rendezvous, or rank 0's store, cannot be reached.
        WorldError: ranks do not come within ``parallel.join_timeout_s``.

    Collective: all ranks.
    """
    here, until_s = launched(), time.monotonic() + config.join_timeout_s
    connected_before = {ends_of(connection) for connection in tcp_connections()}
    store, connect = _serve(here) if here.rank == 0 else _find(here, until_s, config.join_timeout_s)
    me = this_member(here.rank)
    everyone = join(store, me, here.size, config.join_timeout_s)
    heartbeat = RankHeartbeat(
        everyone[here.rank],
        everyone,
        connect(),
        heartbeat_timeout_s=config.heartbeat_timeout_s,
        hang_timeout_s=config.hang_timeout_s,
    )
    heartbeat.served, heartbeat.connected_before = store, connected_before
    heartbeat.start()
    store.set_timeout(GROUP_TIMEOUT)
    return heartbeat, PrefixStore("group", store)


def this_member(rank: int) -> Member:
    """This process, as the others shall know it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            kernel = file.read().strip()
        machine = f"{kernel}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        machine = socket.gethostname()
    return Member(rank, host_name(), os.getpid(), machine)


def join(store: Store, me: Member, size: int, seconds: float) -> list[Member]:
    """All ranks, once they are here.

    Args:
        store: of this start alone.
        seconds: in which all must come.

    Raises:
        WorldError: not all came, or rank 0 is lost again.

    Collective: all ranks.
    """
    # What the heartbeat reads of a rank is there from the start.
    store.set(f"beat/{me.rank}", json.dumps((0, me.where, False, 0.0, seconds + MARGIN_S, False, False)))
    store.set(f"member/{me.rank}", json.dumps(asdict(me)))
    until_s = time.monotonic() + seconds + (MARGIN_S if me.rank else 0.0)
    keys = [f"member/{rank}" for rank in range(size)]
    try:
        if me.rank == 0:
            while not (all_here := store.check(keys)) and time.monotonic() < until_s:
                time.sleep(POLL_S)
            if all_here:
                words = [json.loads(word) for word in store.multi_get(keys)]
                store.set("everyone", json.dumps(words))
            else:
                absent = failures.missing([r for r in range(size) if not store.check([keys[r]])], size, seconds)
                store.set("everyone", absent.to_json())
                time.sleep(2 * POLL_S)  # for the others to read it
                raise _not_joined(absent)
        while not store.check(["everyone"]):
            if time.monotonic() > until_s:
                raise WorldError(f"rank 0 does not say within {seconds + MARGIN_S:.0f} s that all ranks came", REACH)
            time.sleep(POLL_S)
        found = json.loads(store.get("everyone"))
    except DistError as error:
        raise WorldError(f"rank 0 ended while the ranks met: {_first_line(error)}", failures.AGAIN) from error
    if isinstance(found, dict):
        raise _not_joined(Failure.from_json(json.dumps(found)))
    return [Member(**member) for member in found]


def _not_joined(why: Failure) -> WorldError:
    error = WorldError(why.what, why.remedy)
    error.everywhere = True
    return error


def _serve(here: Launched) -> tuple[TCPStore, Callable[[], TCPStore]]:
    """Rank 0: a store of this start's own, where the launcher says or at a free port that its store tells."""
    try:
        if not launcher_serves_store():
            store = TCPStore(here.host, here.port, is_master=True, wait_for_workers=False, multi_tenant=True)
            return store, partial(_client, here.host, here.port)
        alone = here.local_size == here.size
        address = "127.0.0.1" if alone else own_address(here.host, here.port)
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        token = secrets.token_hex(16)
        store.set("start", token)
        _client(here.host, here.port).set(KEY, json.dumps((address, store.port, token)))
        return store, partial(_client, address, store.port)
    except (DistError, RuntimeError, ValueError) as error:
        where = f"the rendezvous at {here.host}:{here.port}"
        raise NetworkError(f"{socket.gethostname()} cannot serve {where}: {_first_line(error)}", REACH) from error


def _find(here: Launched, until_s: float, seconds: float) -> tuple[TCPStore, Callable[[], TCPStore]]:
    """Another rank: rank 0's store. What listens may be of an earlier start, whose rank 0 is gone or about to end: a
    launcher that restarts this rank alone is faster than rank 0 misses the one that was killed.

    Raises:
        NetworkError: nobody listens there.
    """
    why: object = "rank 0 has not come"
    launchers: TCPStore | None = None
    while time.monotonic() < until_s:
        try:
            found = None
            if launchers is None:
                launchers = _client(here.host, here.port)
            if not launcher_serves_store():
                found, launchers = (launchers, partial(_client, here.host, here.port)), None
            elif launchers.check([KEY]):
                address, port, token = json.loads(launchers.get(KEY))
                why = f"rank 0's store at {address}:{port} does not answer"
                store, connect = _client(address, port), partial(_client, address, port)
                if store.check(["start"]) and store.get("start").decode() == token:
                    found = store, connect
            if found is not None:
                if not _has_met(found[0]):
                    return found
                why = EARLIER_START
        except OSError as error:
            why = error.strerror or error
        except DistError as error:
            why = _first_line(error)
        time.sleep(POLL_S)
    raise NetworkError(
        f"{socket.gethostname()} did not reach the rendezvous at {here.host}:{here.port} within {seconds:.0f} s: {why}",
        REACH,
    )


def _has_met(store: Store) -> bool:
    """Whether all ranks of the start that ``store`` is of have met there; this one has not said yet that it came."""
    return store.check(["everyone"]) and isinstance(json.loads(store.get("everyone")), list)


def _client(host: str, port: int) -> TCPStore:
    """Raises OSError, DistError: nobody listens there, or what listens is no store."""
    socket.create_connection((host, port), timeout=CONNECT_S).close()  # one line where nobody does, not torch's pages
    settings = dict(is_master=False, timeout=timedelta(seconds=CONNECT_S), wait_for_workers=False)
    with ThreadPool(1) as pool:  # whose thread stays behind where torch's client waits for ever
        try:
            return pool.apply_async(TCPStore, (host, port), settings).get(CONNECT_S + 1.0)
        except multiprocessing.TimeoutError:
            raise TimeoutError(f"what listens at {host}:{port} is no store") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def choose_interface(host: str, port: int) -> None:
    """Tell gloo which interface leads to rank 0's machine, unless GLOO_SOCKET_IFNAME says it already.

    Left alone, gloo takes the address that this machine's own host name has. Where the name has none, or Debian's
    127.0.1.1, that is the loopback, which no other machine reaches: one rank fails and the others wait.

    Args:
        host, port: where rank 0 listens (MASTER_ADDR and MASTER_PORT).

    Raises:
        NetworkError: there is no address or route to ``host``, or it is this machine's loopback.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    address = own_address(host, port)
    if ipaddress.ip_address(address).is_loopback:
        raise NetworkError(
            f"MASTER_ADDR is {host}, which is the loopback ({address}) on {socket.gethostname()}; other machines "
            "cannot reach it",
            "give rank 0's address on the network, or set GLOO_SOCKET_IFNAME to the interface that leads to the others",
        )
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
    raise NetworkError(
        f"no network interface has the address {address}, from which {host} is reached",
        "set GLOO_SOCKET_IFNAME to the interface that leads to the other machines",
    )


def own_address(host: str, port: int) -> str:
    """This machine's address on the way to ``host``. Nothing is sent."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0].partition("%")[0]
    except OSError as error:
        raise NetworkError(
            f"there is no way to {host} (MASTER_ADDR) from {socket.gethostname()}: {error.strerror}",
            "give the name or address of rank 0's machine as the others know it",
        ) from error
