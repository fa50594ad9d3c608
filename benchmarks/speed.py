"""Seconds of a meta-step: a plain unrolled loop, other libraries where they are installed, and ours, in one run.

    python benchmarks/speed.py                      # or: make speed
    python benchmarks/speed.py --threads 1 --rounds 9 --only "32 px, K = 5"
    PYTHONPATH=PEERS python benchmarks/speed.py     # pip install --no-deps --target PEERS higher torchopt learn2learn

Conv-4 with 64 filters, 5-way 5-shot, 15 queries a class, 4 episodes of random images, MAML (no co-learner), second
order, float32. A case is a fresh process, in which all take turns, round by round; ratios are those of the medians, and
of the fastest, to the plain loop. ``plain`` is written as public PyTorch code of MAML is: the losses of all
episodes in one graph, one backward. Each contender is compared with it in float64 first (relative error of the whole
meta-gradient). ``freed memory kept``: the setting of the C library's allocator that our trainer makes, for all alike;
without it every large tensor is mapped and zeroed anew, for all alike.

The last lines: the fastest convolution and matrix product found on this machine in the same run, and the share of the
former that each reaches, from counted FLOPs of convolutions and products.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cml_dist.data.base import ClassificationDomain
from cml_dist.distributed.allocator import keep_freed_memory
from cml_dist.meta.compiled import CompiledGradient
from cml_dist.meta.gradient import Engine, MetaGradient, meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.nets.conv4 import Conv4
from cml_dist.nets.network import CmlNet
from cml_dist.types import Batch, Episode, Params

CASES = {"32 px, K = 1": (32, 1), "32 px, K = 5": (32, 5), "84 px, K = 1": (84, 1)}
WAYS, SHOTS, QUERIES, EPISODES, RATE = 5, 5, 15, 4, 0.1
Contender = Callable[[Params, list[Episode]], Params]


def make_episodes(pixels: int, dtype: torch.dtype, shots: int = SHOTS, queries: int = QUERIES) -> list[Episode]:
    generator = torch.Generator().manual_seed(0)

    def batch(each: int) -> Batch:
        images = torch.randn(WAYS * each, 3, pixels, pixels, generator=generator, dtype=torch.float64)
        return Batch(images.to(dtype), torch.arange(WAYS).repeat_interleave(each))

    return [Episode(batch(shots), batch(queries), "train", i, ways=WAYS) for i in range(EPISODES)]


# --------------------------------------------------------------------------- contenders


def plain_forward(params: Params, images: Tensor) -> Tensor:
    for block in (f"body.block{number}" for number in range(1, 5)):
        maps = F.conv2d(images, params[f"{block}.conv.weight"], params[f"{block}.conv.bias"], padding=1)
        norm = params[f"{block}.norm.weight"], params[f"{block}.norm.bias"]
        images = F.max_pool2d(F.relu(F.batch_norm(maps, None, None, *norm, training=True)), 2)
    return F.linear(images.flatten(1), params["head.weight"], params["head.bias"])


def plain(
    steps: int, forward: Callable[[Params, Tensor], Tensor] = plain_forward, rate: float = RATE
) -> Contender:  # fmt: skip
    def run(params: Params, episodes: list[Episode]) -> Params:
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        outer = 0.0
        for episode in episodes:
            fast = leaves
            for _ in range(steps):
                loss = loss_of(partial(forward, fast), episode.support)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {name: p - rate * g for (name, p), g in zip(fast.items(), grads, strict=True)}
            outer = outer + loss_of(partial(forward, fast), episode.query)
        (outer / len(episodes)).backward()
        return {name: p.grad for name, p in leaves.items()}

    return run


class PlainConv4(nn.Module):
    """For libraries that take a module; parameters in the order of ours."""

    def __init__(self, like: Params) -> None:
        super().__init__()
        blocks = []
        for number in range(1, 5):
            channels = like[f"body.block{number}.conv.weight"].shape[1]
            norm = nn.BatchNorm2d(64, track_running_stats=False)
            blocks += [nn.Conv2d(channels, 64, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
        self.all = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(*reversed(like["head.weight"].shape)))
        for mine, value in zip(self.parameters(), like.values(), strict=True):
            mine.data = value.clone()

    def forward(self, images: Tensor) -> Tensor:
        return self.all(images)


def loss_of(net: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch.inputs), batch.targets)


# Each adapts a module on a support set, and gives what answers the query set.


@contextmanager
def higher(net: nn.Module, support: Batch, steps: int) -> Iterator[nn.Module]:
    from higher import innerloop_ctx

    inner = torch.optim.SGD(net.parameters(), lr=RATE)
    with innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, optimizer):
        for _ in range(steps):
            optimizer.step(loss_of(fast, support))
        yield fast


@contextmanager
def learn2learn(net: nn.Module, support: Batch, steps: int) -> Iterator[nn.Module]:
    from learn2learn.algorithms import MAML

    fast = MAML(net, lr=RATE).clone()
    for _ in range(steps):
        fast.adapt(loss_of(fast, support))
    yield fast


@contextmanager
def torchopt(net: nn.Module, support: Batch, steps: int) -> Iterator[nn.Module]:
    from torchopt import MetaSGD, extract_state_dict, recover_state_dict

    start, inner = extract_state_dict(net, by="reference"), MetaSGD(net, lr=RATE)
    for _ in range(steps):
        inner.step(loss_of(net, support))
    yield net
    recover_state_dict(net, start)


def by_library(adapted: Callable[..., AbstractContextManager[nn.Module]], steps: int) -> Contender:
    def run(params: Params, episodes: list[Episode]) -> Params:
        net = PlainConv4(params)
        start = list(net.parameters())
        for episode in episodes:
            with adapted(net, episode.support, steps) as fast:
                (loss_of(fast, episode.query) / len(episodes)).backward()
        return {name: p.grad for name, p in zip(params, start, strict=True)}

    return run


def network(pixels: int) -> CmlNet:
    torch.manual_seed(0)
    body = Conv4((3, pixels, pixels))
    return CmlNet(body, nn.Linear(body.pooled_dim, WAYS))


def ours(
    steps: int,
    engine: Engine | str,
    net: CmlNet,
    micro_batch: int | None = None,
    rate: float = RATE,
    compute: Callable[..., MetaGradient] = meta_gradient,
) -> Contender:
    constants = dict(net.named_buffers())
    problem = Problem(net, ClassificationDomain.loss, ClassificationDomain.score, constants, micro_batch)
    method = Method.sgd(steps, rate, rate)

    def run(params: Params, episodes: list[Episode]) -> Params:
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for episode in episodes:
            for name, grad in compute(params, episode, problem, method, engine).grads.items():
                total[name].add_(grad, alpha=1 / len(episodes))
        return total

    return run


def contenders(pixels: int, steps: int, compiled: bool) -> dict[str, Contender]:
    found = {"plain": plain(steps)}
    for library in (higher, learn2learn, torchopt):
        try:
            importlib.import_module(library.__name__)
        except ImportError as error:
            print(f"  {library.__name__} is left out: {error}", file=sys.stderr)
        else:
            found[library.__name__] = by_library(library, steps)
    found |= {f"ours, {engine}": ours(steps, engine, network(pixels)) for engine in ("graph", "adjoint")}
    if compiled:
        found["ours, compiled"] = ours(steps, "graph", network(pixels), compute=CompiledGradient(tell=tell))
    return found


def tell(sentence: str) -> None:
    print(f"  {sentence}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- measuring


def start(pixels: int, dtype: torch.dtype) -> Params:
    return {n: p.detach().to(dtype) for n, p in network(pixels).named_parameters()}


def flat(grads: Params) -> Tensor:
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def measure(pixels: int, steps: int, rounds: int, threads: int, kept: bool, compiled: bool) -> dict:
    """In a fresh process."""
    torch.set_num_threads(threads)
    if kept:
        keep_freed_memory()
    ways = contenders(pixels, steps, compiled)
    params, episodes = start(pixels, torch.float64), make_episodes(pixels, torch.float64)[:1]
    exact = {name: flat(way(params, episodes)) for name, way in ways.items()}
    errors = {name: ((g - exact["plain"]).norm() / exact["plain"].norm()).item() for name, g in exact.items()}
    params, episodes = start(pixels, torch.float32), make_episodes(pixels, torch.float32)
    with FlopCounterMode(display=False) as counter:
        ways["ours, graph"](params, episodes)
    times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            took = seconds(lambda way=way: way(params, episodes))
            times[name] += [took] * (number > 0)  # the first warms up
    return {"times": times, "errors": errors, "flops": counter.get_total_flops(), "peaks": peaks()}


def peaks() -> dict[str, float]:
    """GFLOP/s of the fastest convolution among shapes like Conv-4's, and of a matrix product."""
    found = {"convolution": 0.0, "matrix product": 0.0}
    for batch, side in ((75, 16), (25, 8), (75, 8), (75, 42)):
        images, weight = torch.randn(batch, 64, side, side), torch.randn(64, 64, 3, 3)
        flops = 2 * batch * 64 * 64 * 9 * side**2
        took = min(seconds(lambda i=images, w=weight: F.conv2d(i, w, padding=1)) for _ in range(10))
        found["convolution"] = max(found["convolution"], flops / took / 1e9)
    one, other = torch.randn(1024, 1024), torch.randn(1024, 1024)
    found["matrix product"] = 2 * 1024**3 / min(seconds(lambda: one @ other) for _ in range(10)) / 1e9
    return found


def show(case: str, kept: bool, found: dict) -> None:
    print(f"\n### {case}, freed memory {'kept' if kept else 'given back'}\n")
    print("| | s, fastest | median | slowest | plain / this: medians | fastest | error in float64 | share of peak |")
    print("|---|---|---|---|---|---|---|---|")
    base = found["times"]["plain"]
    for name, times in found["times"].items():
        middle = statistics.median(times)
        share = found["flops"] / 1e9 / min(times) / found["peaks"]["convolution"]
        print(
            f"| {name} | {min(times):.3f} | {middle:.3f} | {max(times):.3f} | {statistics.median(base) / middle:.2f} | "
            f"{min(base) / min(times):.2f} | {found['errors'][name]:.0e} | {share:.0%} |"
        )
    rates = ", ".join(f"{what} {rate:.0f} GFLOP/s" for what, rate in found["peaks"].items())
    print(f"\n{found['flops'] / 1e9:.0f} GFLOP a meta-step (ours, graph); fastest {rates}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--compiled", action="store_true", help="also engine.compile: minutes more for each case")
    parser.add_argument("--in-here", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.in_here:
        print(json.dumps(measure(*json.loads(asked.in_here))))
        return
    print(f"torch {torch.__version__}, {asked.threads} threads, {asked.rounds} rounds")
    for case, (pixels, steps) in CASES.items():
        if asked.only not in case:
            continue
        for kept in (True, False):
            words = json.dumps([pixels, steps, asked.rounds, asked.threads, kept, asked.compiled])
            command = [sys.executable, "-W", "ignore", __file__, "--in-here", words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            show(case, kept, json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
