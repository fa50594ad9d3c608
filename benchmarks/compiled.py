"""A meta-step eager and compiled (``engine.compile=on``), in turn in one process: seconds, memory, error.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --only sinusoid

CML with its co-learner, 4 episodes, one thread, float32. Each case is a fresh process with an empty cache, then another
that finds what the first compiled. MiB: peak of the process in a meta-step, above what it holds before it; error:
relative, of the float32 meta-gradient of one episode against eager arithmetic in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from speed import seconds

from cml_dist.config.load import load_config
from cml_dist.data.sinusoid import SinusoidDomain
from cml_dist.distributed.allocator import keep_freed_memory, peak_since_settled, settled_memory
from cml_dist.meta.compiled import CompiledGradient, distance
from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.nets.build import make_network, method_of
from cml_dist.types import Batch, Episode

IMAGES = ("glyphs", "domain.ways=5", "domain.shots=5", "domain.queries=15")
CASES: dict[str, tuple[tuple[str, ...], int | None, int]] = {
    # name: recipe and overrides, pixels of RGB images (None: a curve), rounds
    "sinusoid, K = 1": (("sinusoid", "method.inner_steps=1"), None, 50),
    "sinusoid, K = 5": (("sinusoid", "method.inner_steps=5"), None, 50),
    "sinusoid, Meta-SGD, K = 5": (("sinusoid", "method.name=meta_sgd", "method.inner_steps=5"), None, 50),
    "conv4 32 px, K = 1": ((*IMAGES, "method.inner_steps=1"), 32, 8),
    "conv4 32 px, K = 5": ((*IMAGES, "method.inner_steps=5"), 32, 5),
    "conv4 84 px, K = 1": ((*IMAGES, "method.inner_steps=1"), 84, 4),
    "test_vit 32 px, K = 1": ((*IMAGES, "model.backbone=test_vit", "model.colearner.depth=1"), 32, 8),
    "test_vit 32 px, K = 5": (
        (*IMAGES, "model.backbone=test_vit", "model.colearner.depth=1", "method.inner_steps=5"), 32, 8,
    ),
    "resnet12 32 px, K = 1": ((*IMAGES, "model.backbone=resnet12", "model.colearner.depth=1"), 32, 2),
}  # fmt: skip
EPISODES = 4


def measure(name: str) -> dict[str, Any]:
    """In a fresh process."""
    torch.set_num_threads(1)
    keep_freed_memory()
    (recipe, *overrides), pixels, rounds = CASES[name]
    config = load_config(recipe, overrides)
    settings = config.domain
    shape, outputs = ((1,), 1) if pixels is None else ((3, pixels, pixels), settings.ways)
    net, loss = make_network(config, shape, outputs), torch.nn.functional.cross_entropy
    if pixels is None:
        domain = SinusoidDomain(settings, {"train": 0, "val": 0, "test": 0})
        loss, episodes = domain.loss, [domain.episode("train", index) for index in range(EPISODES)]
    else:
        generator = torch.Generator().manual_seed(0)

        def batch(each: int) -> Batch:
            labels = torch.arange(settings.ways).repeat_interleave(each)
            return Batch(torch.randn(len(labels), *shape, generator=generator), labels)

        episodes = [
            Episode(batch(settings.shots), batch(settings.queries), "train", index, ways=settings.ways)
            for index in range(EPISODES)
        ]
    problem = Problem(net, loss, lambda out, targets: out.sum() * 0, dict(net.named_buffers()))
    method, found = method_of(config, net), {}
    params = {n: p.detach() for n, p in net.named_parameters()}
    compute = CompiledGradient(tell=partial(print, file=sys.stderr))

    def off(how: Callable) -> float:
        one = episodes[0].map(lambda t: t.double() if t.is_floating_point() else t)
        exact = copy.copy(problem)
        exact.buffers = {n: b.double() if b.is_floating_point() else b for n, b in problem.buffers.items()}
        right = meta_gradient({n: p.double() for n, p in params.items()}, one, exact, method, "graph")
        return distance(how(params, episodes[0].map(floats), problem, method, "graph").grads, right.grads)

    def step(how: Callable) -> Callable[[], None]:
        def run() -> None:
            for episode in episodes:
                how(params, episode.map(floats), problem, method, "graph")

        return run

    def floats(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    ways = {"eager": step(meta_gradient), "compiled": step(compute)}
    found["compile_s"] = seconds(lambda: compute(params, episodes[0].map(floats), problem, method, "graph"))
    for way in ways.values():
        way()
    assert all(graph.run is not None for graph in compute.graphs.values()), "it was not compiled"
    times = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            times[way].append(seconds(run))
    for way, how in (("eager", meta_gradient), ("compiled", compute)):
        found[way] = {"s": times[way], "mib": peak(ways[way]), "error": off(how)}
    return found


def peak(work: Callable[[], object]) -> float:
    """MiB of the process at most while ``work`` runs, above what it holds before (Linux)."""
    before = settled_memory()
    work()
    return (peak_since_settled() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--in-here", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.in_here:
        print(json.dumps(measure(asked.in_here)))
        return
    columns = ("eager s: fastest, median", "compiled", "eager / compiled: medians, fastest", "MiB: eager", "compiled")
    columns = ("", *columns, "error: eager", "compiled", "compile s", "again")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in CASES:
        if asked.only in name:
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, "-W", "ignore", __file__, "--in-here", name]
                how = {"env": {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, "stdout": subprocess.PIPE}
                first, again = (json.loads(subprocess.run(command, check=True, **how).stdout) for _ in range(2))
            show(name, first, again["compile_s"])


def show(name: str, found: dict[str, Any], again_s: float) -> None:
    eager, compiled = found["eager"], found["compiled"]
    (low, mid), (fast, middle) = ((min(way["s"]), statistics.median(way["s"])) for way in (eager, compiled))
    print(
        f"| {name} | {low:.4g}, {mid:.4g} | {fast:.4g}, {middle:.4g} | {mid / middle:.2f}, {low / fast:.2f} | "
        f"{eager['mib']:.0f} | {compiled['mib']:.0f} | {eager['error']:.0e} | {compiled['error']:.0e} | "
        f"{found['compile_s']:.0f} | {again_s:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
