"""Where all processes leave word for each other: plain TCP to one place, which works where the ring does not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cml_dist.doctor.place import Place
from cml_dist.errors import WorldError

if TYPE_CHECKING:
    from torch.distributed import Store

ARRIVE_S = 60.0
"""How long the others may take to arrive after this process."""


class Meeting:
    """Words left under (topic, rank), and heard with a time limit.

    Args:
        store: torch's store of the world; of a lone process, one in memory.
    """

    def __init__(self, store: Store, place: Place) -> None:
        self.place = place
        self._store = store

    @classmethod
    def open(cls, place: Place, limit_s: float = ARRIVE_S) -> Meeting:
        """Go where the launcher says that rank 0 (or its own agent) listens.

        Raises:
            WorldError: nobody listens there.
        """
        from torch.distributed import DistError, HashStore, PrefixStore, TCPStore

        if place.size == 1:
            return cls(HashStore(), place)
        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise WorldError(
                f"WORLD_SIZE is {place.size}, but MASTER_ADDR and MASTER_PORT do not name a place ({error})",
                "start through accelerate launch, torchrun or srun",
            ) from error
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = TCPStore(
                address,
                port,
                is_master=place.rank == 0 and not agent,
                wait_for_workers=False,  # who is missing is to be said, not waited for
                multi_tenant=True,  # the process group, later, listens there too
                timeout=timedelta(seconds=limit_s),
            )
        except (DistError, RuntimeError) as error:
            said = str(error).strip().splitlines()[0][:200]
            fault = WorldError(
                f"rank {place.rank} on {place.host} does not reach {address}:{port}, where the ranks meet: {said}",
                "see whether rank 0 runs there, and whether the name resolves and the port is open on every machine",
            )
            fault.everywhere = False
            raise fault from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(PrefixStore(f"doctor/{attempt}", store), place)

    def say(self, topic: str, word: Any = None) -> None:
        """Leave a word (JSON) of this process; a later one replaces it."""
        self._store.set(f"{topic}/{self.place.rank}", json.dumps(word))

    def heard(self, topic: str, rank: int) -> bool:
        """Whether a rank has left a word."""
        return self._store.check([f"{topic}/{rank}"])

    def hear(self, topic: str, rank: int, limit_s: float) -> Any:
        """The word of a rank.

        Raises:
            TimeoutError: it left none in that time.
        """
        from torch.distributed import DistError

        key = f"{topic}/{rank}"
        try:
            self._store.wait([key], timedelta(seconds=max(limit_s, 0.01)))
            return json.loads(self._store.get(key))
        except (DistError, RuntimeError) as error:
            raise TimeoutError(f"rank {rank} said nothing of {topic} within {limit_s:.0f} s") from error

    def hear_all(self, topic: str, ranks: Iterable[int], limit_s: float) -> dict[int, Any]:
        """The words of all ranks that left one until the time is over (for all together)."""
        import time

        end, words = time.monotonic() + limit_s, {}
        for rank in ranks:
            try:
                words[rank] = self.hear(topic, rank, end - time.monotonic())
            except TimeoutError:
                continue
        return words
