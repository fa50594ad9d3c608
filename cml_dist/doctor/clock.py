"""Clocks of the machines against that of rank 0: each asks for the time, and halves the way."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from cml_dist.doctor.board import Board
from cml_dist.doctor.findings import Finding
from cml_dist.doctor.place import Place

LIMIT_S = 30.0
FAR_S = 1.0
"""A larger difference confuses logs, leases and times of files."""


def ask_time(board: Board) -> None:
    """Ask rank 0, and leave this machine's difference as the word ``clock``: [seconds ahead, give or take]."""
    board.say("clock-asks")
    board.hear(f"clock-turn-of-{board.place.rank}", 0, LIMIT_S)
    started = time.time()
    board.say("clock-waits")
    answer = board.hear(f"clock-for-{board.place.rank}", 0, LIMIT_S)
    ended = time.time()
    board.say("clock", [(started + ended) / 2 - answer, (ended - started) / 2])


def tell_time(board: Board, ranks: Iterable[int]) -> dict[int, list[float]]:
    """Rank 0: answer the first process of each other machine, one after the other; returns their words."""
    words = {}
    for rank in ranks:
        try:
            board.hear("clock-asks", rank, LIMIT_S)
            board.say(f"clock-turn-of-{rank}")
            board.hear("clock-waits", rank, LIMIT_S)
            board.say(f"clock-for-{rank}", time.time())
            words[rank] = board.hear("clock", rank, LIMIT_S)
        except TimeoutError:
            continue
    return words


def clock_findings(words: Mapping[int, list[float]], places: Mapping[int, Place]) -> Iterator[Finding]:
    """The largest difference, and every machine whose clock is off."""
    if not words:
        return
    far = {rank: word for rank, word in words.items() if abs(word[0]) - word[1] > FAR_S}
    data = {places[rank].host: {"ahead_s": ahead, "give_or_take_s": error} for rank, (ahead, error) in words.items()}
    if far:
        shown = ", ".join(f"{places[rank].host} {_words(word[0])}" for rank, word in far.items())
        yield Finding(
            "clocks", "warning", f"against {places[0].host}: {shown}", "set them by NTP (chronyc tracking)", data=data
        )
        return
    largest = max(abs(ahead) for ahead, _ in words.values())
    error = max(error for _, error in words.values())
    yield Finding("clocks", "ok", f"of {len(words) + 1} machines agree to {1e3 * (largest + error):.3g} ms", data=data)


def _words(seconds: float) -> str:
    return f"is {abs(seconds):.3g} s {'ahead' if seconds > 0 else 'behind'}"
