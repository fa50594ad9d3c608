"""A wire between two network namespaces that delays frames and loses some: netem's work where the kernel has none.

``python lossy_wire.py NAMESPACE NAMESPACE DELAY_MS LOSS_PERCENT`` makes a tap device ``eth0`` in each, prints a line
once both are there, and carries frames until it is killed; the devices go with it.
"""

from __future__ import annotations

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

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
FRAME_BYTES = 2048


def tap(namespace: str, name: str = "eth0") -> int:
    """A new tap device inside ``namespace``. This process goes there for a moment: it is no process of that machine."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    enter(os.open(f"/run/netns/{namespace}", os.O_RDONLY))
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    enter(home)
    return device


def enter(namespace: int) -> None:
    """Put this process into an opened network namespace (Python has os.setns from 3.12 on)."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(namespace)


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
