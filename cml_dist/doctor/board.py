"""Where all processes leave word for each other: plain TCP to one place, which works where the ring does not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cml_dist.doctor.place import Place

if TYPE_CHECKING:
    from torch.distributed import Store

ARRIVE_S = 60.0
"""How long the others may take to arrive after this process."""


class Board:
    """Words left under (topic, rank), and heard with a time limit.

    Args:
        store: torch's store of the world; of a lone process, one in memory.
    """

    def __init__(self, store: Store, place: Place) -> None:
        self.place = place
        self._store = store

    @classmethod
    def open(cls, place: Place, limit_s: float = ARRIVE_S) -> Board:
        """Go where the launcher says that rank 0 (or its own agent) listens.

        Raises:
            WorldError: the launcher's variables are missing.
            NetworkError: nobody listens there.
        """
        from torch.distributed import HashStore, PrefixStore

        from cml_dist.parallel.env import launched
        from cml_dist.parallel.meeting import launcher_store

        if place.size == 1:
            return cls(HashStore(), place)
        store = launcher_store(launched(), lambda: limit_s)
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
        end, words = time.monotonic() + limit_s, {}
        for rank in ranks:
            try:
                words[rank] = self.hear(topic, rank, end - time.monotonic())
            except TimeoutError:
                continue
        return words
