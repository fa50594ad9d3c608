"""How the processes of a world meet: through the launcher's store, and in the watch before any process group exists."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from cml_dist.config.schema import ParallelConfig
from cml_dist.errors import NetworkError
from cml_dist.parallel.arrival import RETRY_S, Arriving, arrive
from cml_dist.parallel.launched import Launched, launched
from cml_dist.parallel.verdict import Member
from cml_dist.parallel.watch import Joined, this_watch
from cml_dist.parallel.wire import Wire

KEY = "cml_dist/watch"
ANSWER_S = 5.0
REACH = (
    "see whether rank 0's process runs there, whether MASTER_ADDR and MASTER_PORT are the same everywhere, and whether "
    "a firewall is in between"
)


def meet(config: ParallelConfig) -> tuple[Joined, Store]:
    """Find the other processes that the launcher started, and watch each other from now on.

    Returns:
        (the watch, a store that no other start of a world has written to).

    Raises:
        NetworkError: the rendezvous, or rank 0's watch, cannot be reached.
        WorldError: the launcher's variables are missing, or ranks do not come within ``parallel.join_timeout_s``.

    Collective: all ranks.
    """
    here, under_way = launched(), this_watch()
    arriving = under_way if isinstance(under_way, Arriving) else arrive(config)

    def patience_s() -> float:
        """Whom the watch knows may take its time to import; whom it does not may never have been started."""
        return config.join_timeout_s if arriving.joined is None else config.timeout_s

    store = launcher_store(here, patience_s)
    watch = join(arriving, store, config.join_timeout_s)
    # A store outlives its ranks when the launcher starts them again: what they have written may not be read.
    store.set_timeout(group_timeout(config))
    return watch, PrefixStore(watch.meeting, store)


def launcher_store(here: Launched, patience_s: Callable[[], float]) -> TCPStore:
    """Where the launcher says that the ranks meet; who else has come is not waited for.

    Args:
        patience_s: seconds in which it must be there, as far as is known by now.

    Raises:
        NetworkError: nobody listens there.
    """
    # The launcher's agent on rank 0's machine serves the store; without one rank 0 does.
    serves = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"the rendezvous at {here.host}:{here.port}"
    if not serves:
        _await_listener(here, where, patience_s)
    try:
        return TCPStore(
            here.host,
            here.port,
            is_master=serves,
            timeout=timedelta(seconds=patience_s()),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (DistError, RuntimeError, ValueError) as error:
        what = "serve" if serves else "use"
        raise NetworkError(f"{socket.gethostname()} cannot {what} {where}: {_first_line(error)}", REACH) from error


def _await_listener(here: Launched, where: str, patience_s: Callable[[], float]) -> None:
    """One line where nobody listens, instead of torch's pages.

    Raises:
        NetworkError: nobody does within ``patience_s()``.
    """
    began_s = time.monotonic()
    while True:
        try:
            socket.create_connection((here.host, here.port), timeout=min(ANSWER_S, patience_s())).close()
            return
        except OSError as error:
            if time.monotonic() + RETRY_S > began_s + patience_s():
                why = error.strerror or error
                raise NetworkError(
                    f"{socket.gethostname()} did not reach {where} within {patience_s():.0f} s: {why}", REACH
                ) from error
        time.sleep(RETRY_S)


def group_timeout(config: ParallelConfig) -> timedelta:
    """Of torch's own collectives: the watch knows more, and speaks first.

    Long, since it begins anew with no move of the rank that is waited for: a long episode, a save to a slow disk.
    """
    return timedelta(seconds=10 * config.timeout_s + 30)


def join(arriving: Arriving, store: Store, patience_s: float) -> Joined:
    """This rank's watch, once all are there.

    Args:
        patience_s: seconds after which to give up those that were never heard of.

    Raises:
        NetworkError: rank 0 cannot be reached, or lets nobody in.
        WorldError: not all came.
    """
    if arriving.me.rank == 0:
        store.set(KEY, json.dumps(arriving.meeting))
    found = _find_leader(arriving, store, time.monotonic() + patience_s)
    arriving.stop_looking()
    if arriving.joined is not None and found is not None:
        found[1].close()  # it was found both ways
    watch = arriving.joined or arriving.enter(*found)
    watch.await_all(patience_s)
    return watch


def _find_leader(arriving: Arriving, store: Store, until_s: float) -> tuple[Member, Wire] | None:
    """Be welcomed by rank 0. What the store says may be of an earlier start, whose rank 0 is gone: ask again.

    Returns:
        rank 0 and the connection to it; None: it is found by now, since it had only started late.
    """
    why = "it published no address"
    while arriving.joined is None and time.monotonic() < until_s:
        try:
            meeting = json.loads(store.get(KEY)) if store.check([KEY]) else {"addresses": []}
        except (DistError, RuntimeError) as error:
            why = _first_line(error)
            break
        for address in meeting["addresses"]:
            try:
                return _knock(arriving, address, meeting)
            except (OSError, ValueError) as error:
                why = f"{address}:{meeting['port']}: {error}"
        time.sleep(RETRY_S)
    if arriving.joined is not None:
        return None
    raise NetworkError(
        f"rank 0 did not let in this process on host {arriving.me.host}: {why}",
        "see what rank 0 says, and whether its machine lets connections in",
    )


def _knock(arriving: Arriving, address: str, meeting: dict) -> tuple[Member, Wire]:
    """Raises OSError, ValueError: it is not rank 0 who answers, or it refuses."""
    until_s = time.monotonic() + ANSWER_S
    wire, answer = arriving.knock(
        address, meeting["port"], meeting["token"], ANSWER_S, lambda: time.monotonic() < until_s
    )
    if answer.get("welcome") != meeting["countersign"]:
        wire.close()
        raise ValueError("another program answers")
    return Member(**answer["leader"]), wire


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
