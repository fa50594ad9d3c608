"""A wire between two network namespaces that delays frames and loses some: netem's work where the kernel has none.

``python lossy_wire.py NAMESPACE NAMESPACE DELAY_MS LOSS_PERCENT`` makes a tap device ``eth0`` in each, prints a line
once both are there, and carries frames until it is killed; the devices go with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
FRAME_BYTES = 2048


def tap(namespace: str, name: str = "eth0") -> int:
    """A new tap device inside ``namespace``. This process goes there for a moment: it is no process of that machine."""
    with inside(namespace):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in a network namespace: the sockets and devices that it makes there stay there."""
    with open("/proc/thread-self/ns/net", "rb") as home, open(f"/run/netns/{namespace}", "rb") as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(home.fileno())


def _enter(namespace: int) -> None:
    """Python has os.setns from 3.12 on."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def carry(ends: tuple[int, int], delay_s: float, loss: float) -> None:
    """Each frame to the other end, ``delay_s`` later and in order; one in 1 / ``loss`` never."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    lost = random.Random(0)
    on_the_way: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait_s = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for end in select.select(ends, (), (), wait_s)[0]:
            frame = os.read(end, FRAME_BYTES)
            if lost.random() >= loss:
                count += 1  # of equal times the older goes first
                heapq.heappush(on_the_way, (time.monotonic() + delay_s, count, other[end], frame))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            *_, end, frame = heapq.heappop(on_the_way)
            try:
                os.write(end, frame)
            except OSError:  # that end is down: a frame into nowhere, as on any wire
                pass


if __name__ == "__main__":
    one, two, delay_ms, loss_percent = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # with who started it
    taps = tap(one), tap(two)
    print("up", flush=True)
    carry(taps, float(delay_ms) / 1000, float(loss_percent) / 100)
