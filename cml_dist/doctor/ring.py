"""The ring between ranks, over what the run itself will use (gloo, or NCCL): latency, bandwidth, and a right sum.

Neighbours play ping-pong, first all even pairs and then all odd ones, as no rank may be in two pairs at once; then all
ranks reduce 64 MiB. Each rank says beforehand what it is about to do, so that a hang has a name.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cml_dist.doctor.board import Board
from cml_dist.doctor.findings import Finding, names
from cml_dist.doctor.place import Place
from cml_dist.parallel.world import World

MIB = 2**20
PINGS, WARM_PINGS = 50, 5
BLOCK_BYTES = 4 * MIB
ENOUGH_S = 0.3
"""Of blocks on the way, for the bandwidth of a pair."""
MAX_BLOCKS = 64
REDUCED_BYTES, SMALL_BYTES = 64 * MIB, MIB
REDUCES, REDUCE_S = 3, 20.0
"""So often; and where it would take longer, less is reduced."""

SLOW_MB_PER_S, SLOW_MS = 50.0, 5.0
FAR_BELOW = 0.25
"""A pair below this part of the median of its kind (inside a machine, or between two) is named as slow."""


@dataclass(frozen=True)
class Pair:
    """Two neighbours: half a round trip of 8 bytes, and the bandwidth of 4 MiB blocks to and fro."""

    first: int
    second: int
    ms: float
    mb_per_s: float


@dataclass(frozen=True)
class Reduced:
    """An all-reduce: bytes, seconds, and whether the sum was right."""

    bytes: int
    seconds: float
    right: bool

    @property
    def mb_per_s(self) -> float:
        return self.bytes / self.seconds / 1e6


def neighbours(size: int) -> list[list[tuple[int, int]]]:
    """The pairs of a ring, in rounds in which no rank has two."""
    if size < 2:
        return []
    pairs = [(rank, (rank + 1) % size) for rank in range(size if size > 2 else 1)]
    odd_one_out = [pairs.pop()] if size > 2 and size % 2 else []
    rounds = [pairs[0::2], pairs[1::2], odd_one_out]
    return [each for each in rounds if each]


def measure_ring(world: World, board: Board) -> None:
    """Play this rank's part; results are left as words ``pair`` (by the pair's first) and ``reduced`` (rank 0).

    Collective: all ranks.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # of this thread
    for each in neighbours(world.size):
        for first, second in each:
            if world.rank in (first, second):
                board.say("at", f"the pair of ranks {first} and {second}")
                found = _play(world, first, second)
                if found is not None:
                    board.say("pair", asdict(found))
    board.say("at", "the all-reduce")
    reduced = _reduce(world)
    if world.is_main:
        board.say("reduced", asdict(reduced))
    board.say("at", "the end")


def _play(world: World, first: int, second: int) -> Pair | None:
    """Ping-pong; the first of the two returns what it measured."""
    serves, other = (True, second) if world.rank == first else (False, first)
    small = torch.zeros(8, dtype=torch.uint8, device=world.device)
    for _ in range(WARM_PINGS):
        _round_trip(world, small, serves, other)
    trips = [_round_trip(world, small, serves, other) for _ in range(PINGS)]
    block = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=world.device)
    once = _round_trip(world, block, serves, other)
    count = torch.tensor([min(MAX_BLOCKS, max(1, round(ENOUGH_S / max(once, 1e-6))))], device=world.device)
    if serves:
        torch.distributed.send(count, other)
    else:
        torch.distributed.recv(count, other)
    seconds = [_round_trip(world, block, serves, other) for _ in range(int(count))]
    if not serves:
        return None
    return Pair(first, second, 500 * statistics.median(trips), 2 * BLOCK_BYTES / statistics.median(seconds) / 1e6)


def _round_trip(world: World, data: torch.Tensor, serves: bool, other: int) -> float:
    """Seconds of there and back, for the side that serves."""
    started = time.perf_counter()
    if serves:
        torch.distributed.send(data, other)
        torch.distributed.recv(data, other)
    else:
        torch.distributed.recv(data, other)
        torch.distributed.send(data, other)
    _settle(world)
    return time.perf_counter() - started


def _reduce(world: World) -> Reduced:
    size = SMALL_BYTES
    _one_reduce(world, size)  # the first one connects
    _, seconds = _one_reduce(world, size)
    slowest = world.max(seconds)
    while size < REDUCED_BYTES and REDUCES * slowest * 2 * size / SMALL_BYTES < REDUCE_S:
        size *= 2
    runs = [_one_reduce(world, size) for _ in range(REDUCES)]
    right = world.max(float(not all(ok for ok, _ in runs))) == 0
    return Reduced(size, world.max(statistics.median(seconds for _, seconds in runs)), right)


def _one_reduce(world: World, size: int) -> tuple[bool, float]:
    """Whether the sum over ranks of rank + 1 came out, and the seconds."""
    data = torch.full((size // 4,), world.rank + 1.0, dtype=torch.float32, device=world.device)
    _settle(world)
    torch.distributed.barrier()
    started = time.perf_counter()
    torch.distributed.all_reduce(data)
    _settle(world)
    seconds = time.perf_counter() - started
    return bool((data == world.size * (world.size + 1) / 2).all()), seconds


def _settle(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


# --------------------------------------------------------------------------- what it means


def ring_findings(
    pairs: list[Pair], reduced: Reduced | None, backend: str, places: Mapping[int, Place], gradient: int | None
) -> Iterator[Finding]:
    """Findings of rank 0 on what was measured.

    Args:
        gradient: bytes of a meta-gradient, to say how long one would take; None where it is not known.
    """
    kinds = {
        "inside machines": [p for p in pairs if places[p.first].host == places[p.second].host],
        "between machines": [p for p in pairs if places[p.first].host != places[p.second].host],
    }
    for kind, members in kinds.items():
        if members:
            yield _of_kind(f"{backend}, {kind}", members, places)
    if reduced is None:
        return
    value = f"{reduced.bytes / MIB:.0f} MiB over {len(places)} ranks in {_ms(1e3 * reduced.seconds)}"
    value += f", {_mb(reduced.mb_per_s)}"
    data = {**asdict(reduced), "mb_per_s": reduced.mb_per_s}
    if not reduced.right:
        remedy = "do not train on this: update the driver, NCCL or torch; try run.device=cpu"
        yield Finding("all-reduce", "fault", f"{value}, with a WRONG sum", remedy, data=data)
    else:
        value += ", sum right"
        if gradient is not None:
            # Twice round the ring, with a message to each neighbour, or by its size.
            late = 2 * (len(places) - 1) * max((pair.ms for pair in pairs), default=0.0)
            takes = max(late, 1e3 * reduced.seconds * gradient / reduced.bytes)
            value += f"; a meta-gradient ({gradient / MIB:.3g} MiB) takes about {_ms(takes)}"
        yield Finding("all-reduce", "ok", value, data=data)


def _of_kind(name: str, pairs: list[Pair], places: Mapping[int, Place]) -> Finding:
    """One line for the pairs of a kind; the slowest is named."""
    slowest = min(pairs, key=lambda pair: pair.mb_per_s)
    latest = max(pairs, key=lambda pair: pair.ms)
    middle = statistics.median(pair.mb_per_s for pair in pairs)
    speeds, delays = sorted(pair.mb_per_s for pair in pairs), sorted(pair.ms for pair in pairs)
    who = names((slowest.first, slowest.second), places)
    value = f"{_range(speeds, _mb)}, latency {_range(delays, _ms)}"
    value += f"; slowest: {who}" if len(pairs) > 1 else f" ({who})"
    data = {"pairs": [asdict(pair) for pair in pairs]}
    interface = (
        "name the fast network: GLOO_SOCKET_IFNAME=... (NCCL_SOCKET_IFNAME=...), and look at that cable or switch"
    )
    if slowest.mb_per_s < FAR_BELOW * middle:
        return Finding(name, "warning", f"{value}, far below the median of {_mb(middle)}", interface, data=data)
    if slowest.mb_per_s < SLOW_MB_PER_S:
        return Finding(name, "warning", f"{value}: slow for gradients", interface, data=data)
    if latest.ms > SLOW_MS:
        return Finding(name, "warning", f"{value}: each message is late", interface, data=data)
    return Finding(name, "ok", value, data=data)


def hang_finding(said: str, at: Mapping[int, Any], places: Mapping[int, Place]) -> Finding:
    """A ring that did not end: who waits for what."""
    waiting: dict[str, list[int]] = {}
    for rank in places:
        waiting.setdefault(str(at.get(rank, "nothing: it never began")), []).append(rank)
    waiting.pop("the end", None)
    shown = "; ".join(f"{names(ranks, places)}: in {where}" for where, ranks in waiting.items())
    remedy = (
        "see whether these machines reach each other on all ports (firewall), on the interface that "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names; with NCCL_DEBUG=INFO it says more"
    )
    return Finding("ring", "fault", f"{said}. Stuck: {shown or 'nobody'}", remedy)


def _range(values: list[float], show: Any) -> str:
    low, high = show(values[0]), show(values[-1])
    return (
        low
        if low == high
        else f"{low.rsplit(' ', 1)[0]} to {high}"
        if _unit(low) == _unit(high)
        else f"{low} to {high}"
    )


def _unit(shown: str) -> str:
    return shown.rsplit(" ", 1)[1]


def _mb(value: float) -> str:
    return f"{value:,.0f} MB/s" if value >= 10 else f"{value:.2g} MB/s"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
