"""Weak scaling: the same work a rank with more ranks; what the reduction takes, and what overlapping it could save.

    python benchmarks/weak_scaling.py                         # as root, for the namespaces; about 15 minutes on 2 cores
    python benchmarks/weak_scaling.py --only conv4 --gbit 1 --megabit 1000

First 1 and 2 ranks, each on a core of its own, over the loopback. Then 4 to 16 ranks, each in a network namespace of
its own, whose meta-gradient is a wait of the time measured with one rank and a value of the right size; the rest is the
trainer's own: DDP on gloo, the metrics, the heartbeat.

The wire is a process that carries packets of 64 KB between tun devices, each sender at the bandwidth and each packet
late by the delay; it needs no netem. Two cores cannot play 16 machines at 10 Gbit/s: so it carries ``--megabit`` a
second, its delay is longer in the same measure, and the seconds that ranks wait for it are divided by that. CPU time
hardly counts then; of that the first part tells.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import json
import multiprocessing
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))
import lossy_wire  # noqa: E402

CASES = {
    "conv4": ("domain.shots=5",),
    "resnet12": ("model.backbone=resnet12", "method.name=maml", "domain.shots=1", "domain.queries=5"),
}
"""5-way, Glyphs (28 px), 4 episodes a rank, one inner step, second order; conv4 with the co-learner, 15 queries."""

EPISODES, WARM_UP, STEPS = 4, 3, 8
DELAY_S = 0.0002
IFF_TUN = 0x0001
MTU = 65000


# --------------------------------------------------------------------------- the wire


def tun(namespace: str, address: str) -> int:
    """A new device ``eth0`` inside ``namespace``."""
    with lossy_wire.inside(namespace):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        words = struct.pack("16sH", b"eth0", IFF_TUN | lossy_wire.IFF_NO_PI)
        fcntl.ioctl(device, lossy_wire.TUNSETIFF, words)
    for words in (
        "link set lo up",
        f"link set eth0 mtu {MTU} txqueuelen 10000 up",
        f"address add {address}/24 dev eth0",
    ):
        subprocess.run(["ip", "-n", namespace, *words.split()], check=True)
    return device


def carry(ends: list[int], bits_per_s: float, delay_s: float) -> None:
    """Each packet to the end that its address names (10.78.0.1 is the first), once it is sent and the delay is over."""
    number = {end: index for index, end in enumerate(ends)}
    free_s = [0.0] * len(ends)
    on_the_way: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait_s = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for end in select.select(ends, (), (), wait_s)[0]:
            packet, sender = os.read(end, MTU), number[end]
            if packet[0] >> 4 != 4 or not 0 < packet[19] <= len(ends):
                continue
            free_s[sender] = max(free_s[sender], time.monotonic()) + 8 * len(packet) / bits_per_s
            count += 1
            heapq.heappush(on_the_way, (free_s[sender] + delay_s, count, ends[packet[19] - 1], packet))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            *_, end, packet = heapq.heappop(on_the_way)
            with contextlib.suppress(OSError):  # its queue is full: a packet lost
                os.write(end, packet)


@contextlib.contextmanager
def machines(count: int, bits_per_s: float, delay_s: float) -> Iterator[list[str]]:
    """Network namespaces with the addresses 10.78.0.1 and on; removed at the end."""
    names = [f"weak-{os.getpid()}-{number}" for number in range(count)]
    wire = None
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        words = json.dumps([names, bits_per_s, delay_s])
        wire = subprocess.Popen([sys.executable, __file__, "--wire", words], stdout=subprocess.PIPE, text=True)
        assert wire.stdout.readline() == "up\n"
        yield names
    finally:
        if wire is not None:
            wire.kill()
            wire.communicate()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


# --------------------------------------------------------------------------- a rank


def sent_bytes() -> int:
    """What has left by eth0, here."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "eth0":
            return int(values.split()[8])
    return 0


def rank(number: int, size: int, settings: list[str], wait_s: float | None, namespace: str | None, port: int, told):
    """In a process of its own: train, and tell what the steps took."""
    import torch

    from cml_dist.config.load import load_config
    from cml_dist.distributed.strategy import DataParallel
    from cml_dist.distributed.world import World
    from cml_dist.meta import model as meta
    from cml_dist.meta.gradient import MetaGradient
    from cml_dist.run import trainer
    from cml_dist.telemetry.console import Console

    if namespace is None:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})
    else:
        with open(f"/run/netns/{namespace}", "rb") as there:
            lossy_wire._enter(there.fileno())
    if size > 1:
        local = (number, size) if namespace is None else (0, 1)
        values = (number, size, *local, "127.0.0.1" if namespace is None else "10.78.0.1", port)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})

    now, steps, found = {}, [], {}

    def timed(part: str, work):
        def measured(*args, **named):
            began_s, began_cpu_s = time.perf_counter(), time.thread_time()
            result = work(*args, **named)
            now[part] = now.get(part, 0.0) + time.perf_counter() - began_s
            now[f"{part}, CPU"] = now.get(f"{part}, CPU", 0.0) + time.thread_time() - began_cpu_s
            return result

        return measured

    def waits(params, episode, *_, **__):
        time.sleep(wait_s)
        terms = {name: torch.zeros(()) for name in ("loss", "outer_loss", "score")}
        return MetaGradient({name: torch.zeros_like(value) for name, value in params.items()}, terms)

    autograd, last = torch.autograd.grad, [0.0]

    def last_backward(*args, **named):
        began_s = time.thread_time()
        result = autograd(*args, **named)
        last[0] = time.thread_time() - began_s
        return result

    backward = timed("reduction", DataParallel._backward)

    def reduction(self, loss):
        found["bytes"] = sum(value.numel() * value.element_size() for value in self.model.values)
        now["last backward"] = last[0]
        backward(self, loss)

    torch.autograd.grad = last_backward
    meta.meta_gradient = timed("compute", meta.meta_gradient if wait_s is None else waits)
    DataParallel._backward = reduction
    start_sum = timed("metrics", World.start_sum)
    World.start_sum = lambda world, values: timed("metrics", start_sum(world, values))
    began = [time.perf_counter(), sent_bytes()]

    def on_step(step: int, what: str) -> None:
        if what == "step":
            steps.append({**now, "whole": time.perf_counter() - began[0], "sent": sent_bytes() - began[1]})
            now.clear()
            began[:] = time.perf_counter(), sent_bytes()

    trainer.train(load_config("glyphs", settings), Console(open(os.devnull, "w")), on_step=on_step)
    told.put((number, found["bytes"], steps[WARM_UP:]))


def run(case: str, size: int, wait_s: float | None = None, names: list[str] | None = None) -> dict[str, float]:
    """Medians over the steps of the ranks' means, and the bytes of the meta-gradient."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # PyTorch is imported once for all ranks
    told = fork.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        settings = (
            *CASES[case], f"train.episodes_per_step={EPISODES * size}", f"train.steps={STEPS}",
            "eval.every=0", "eval.val_episodes=1", "eval.final=false", f"checkpoint.every={STEPS}", "engine.name=graph",
            "run.device=cpu", "run.log_every=1000", "parallel.threads=1", f"run.dir={folder}/run",
        )  # fmt: skip
        ranks = [
            fork.Process(target=rank, args=(r, size, settings, wait_s, names[r] if names else None, port, told))
            for r in range(size)
        ]
        for process in ranks:
            process.start()
        found = [told.get() for _ in ranks]
        for process in ranks:
            process.join()
    parts = {part for step in found[0][2] for part in step}
    means = {part: np.mean([[step[part] for step in steps] for _, _, steps in found], axis=0) for part in parts}
    # Whoever comes last waits for nobody: what it takes is the reduction itself.
    least = np.min([[step["reduction"] for step in steps] for _, _, steps in found], axis=0)
    medians = {part: float(np.median(values)) for part, values in means.items()}
    return {**medians, "shortest reduction": float(np.median(least)), "bytes": found[0][1]}


# --------------------------------------------------------------------------- tables


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument("--gbit", type=float, nargs="*", default=[1, 10])
    parser.add_argument("--megabit", type=float, default=100)
    parser.add_argument("--wire", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.wire:
        ctypes.CDLL(None).prctl(lossy_wire.PR_SET_PDEATHSIG, signal.SIGKILL)
        names, bits_per_s, delay_s = json.loads(asked.wire)
        ends = [tun(name, f"10.78.0.{number + 1}") for number, name in enumerate(names)]
        print("up", flush=True)
        carry(ends, bits_per_s, delay_s)
        return
    import cml_dist.run.trainer  # noqa: F401

    alone = {}
    row("one core a rank", "ranks", "MB", "step, s", "compute", "compute, CPU", "reduction, mean over the ranks",
        "reduction, of who comes last", "last backward")  # fmt: skip
    row(*["---"] * 9)
    for case in (case for case in CASES if asked.only in case):
        for size in (1, 2):
            found = run(case, size)
            alone.setdefault(case, found)
            seconds = ("whole", "compute", "compute, CPU", "reduction", "shortest reduction", "last backward")
            row(case, size, f"{found['bytes'] / 1e6:.2f}", *(f"{found[part]:.4f}" for part in seconds))
    print(f"\nSimulated wire, which really carries {asked.megabit:g} Mbit/s; seconds in its own measure\n")
    row("", "ranks", "Gbit/s", "compute", "blocked in the gradient", "in the metrics", "the wire's own time", "ratio",
        "MB sent a rank", "2 (N - 1) / N x MB", "efficiency", "overlap saves at most")  # fmt: skip
    row(*["---"] * 12)
    for case, one in alone.items():
        for gbit in asked.gbit:
            slower = 1000 * gbit / asked.megabit
            for size in asked.ranks:
                with machines(size, 1e9 * gbit / slower, DELAY_S * slower) as names:
                    found = run(case, size, one["compute, CPU"] / EPISODES, names)
                ideal = 2 * (size - 1) / size * one["bytes"]
                # A ring passes N - 1 pieces on, twice, and each is late by the delay.
                wire_s = 8 * ideal / (1e9 * gbit) + 2 * (size - 1) * DELAY_S
                blocked, metrics = found["reduction"] / slower, found["metrics"] / slower
                whole = one["compute, CPU"] + blocked + metrics
                row(
                    case, size, f"{gbit:g}", f"{found['compute']:.3f}", f"{blocked:.4f}", f"{metrics:.4f}",
                    f"{wire_s:.4f}", f"{blocked / wire_s:.2f}", f"{found['sent'] / 1e6:.3f}", f"{ideal / 1e6:.3f}",
                    f"{one['compute, CPU'] / whole:.1%}", f"{min(blocked, one['last backward']) / whole:.1%}",
                )  # fmt: skip


if __name__ == "__main__":
    main()
