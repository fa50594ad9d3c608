"""Parity, seconds and memory of a meta-step on a GPU, and the largest ViT that trains exactly on it, in ten minutes.

    python benchmarks/gpu_check.py                                # or: make gpu-check
    python benchmarks/gpu_check.py --only conv4 --out check.json
    python benchmarks/gpu_check.py --device cpu --small           # that the script itself works, anywhere

First table: second order, MAML, 5-way 5-shot, 15 queries a class, 4 episodes of random images, float32, each case in a
fresh process and each way after a first run that warms up. ``plain`` is the loop of speed.py: the losses of all
episodes in one graph, one backward; for Conv-4 written out, else over the same network module. ``error`` is that of the
meta-gradient of two small episodes in float64, relative to that of the first way that could do it. GiB are of live
tensors at most, above the parameters. All compute as the trainer does: deterministic kernels, no TF32.

Second table: one full meta-step of CML, K = 5, in bfloat16 as of ``run.precision=bf16``, of the largest ViT of timm
that fits (random weights), with its parameters in GiB: adjoint, every sqrt(K)-th point kept, on the CPU.

What runs out of memory or fails is a row that says so, and what the time did not allow too; the important come first.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from plan import gpu_arithmetic
from speed import (
    EPISODES,
    QUERIES,
    SHOTS,
    WAYS,
    Contender,
    flat,
    make_episodes,
    network,
    ours,
    plain,
    plain_forward,
    seconds,
)
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from cml_dist.config.schema import ModelConfig
from cml_dist.meta.compiled import CompiledGradient
from cml_dist.meta.gradient import Engine
from cml_dist.meta.model import MetaModel
from cml_dist.nets.build import build_net, make_network, method_of
from cml_dist.nets.guard import couples_examples
from cml_dist.nets.network import CmlNet
from cml_dist.telemetry.console import Console
from cml_dist.types import Episode, Params

RATE = 0.01  # with which no network here is chaotic
ROUNDS, ROUNDS_S = 10, 5.0
"""Meta-steps of a way that are timed: so many, or fewer where they took so long."""

LEAST_S = 20.0
"""With less time left nothing more is started."""

PARITY = 1e-9
TARGET = 5.0
"""Times as fast as the plain loop should Conv-4 be, whose kernels are short: launching them takes the time."""


@dataclass(frozen=True)
class Case:
    backbone: str
    pixels: int
    steps: int

    def __str__(self) -> str:
        return f"{self.backbone} {self.pixels} px, K = {self.steps}"


FULL = "out of memory"
LARGEST = "largest ViT"
VIT, RESNET = "vit_small_patch16_224", "resnet12"
CASES = [
    *(Case("conv4", pixels, steps) for pixels in (28, 84) for steps in (1, 5)),
    LARGEST,
    *(Case(VIT, 224, steps) for steps in (5, 1)),
    *(Case(RESNET, 84, steps) for steps in (5, 1)),
]
SMALL_CASES = [Case("conv4", 16, 5), Case("test_resnet", 32, 1), Case("test_vit", 32, 2), LARGEST]
VITS = ("gigantic_patch14", "giant_patch14", "huge_patch14", "large_patch16", "base_patch16", "small_patch16")
MICRO_BATCHES = (25, 5, 1)


# --------------------------------------------------------------------------- ways to compute a meta-gradient


def forward_of(net: CmlNet) -> Callable[[Params, Tensor], Tensor]:
    def forward(params: Params, images: Tensor) -> Tensor:
        (outputs,) = functional_call(net, params, (images,))
        return outputs

    return forward


def batched(steps: int) -> Contender:
    """All episodes at once. Each one's gradient is taken inside vmap: norms would see all episodes outside of it."""

    def loss(params: Params, inputs: Tensor, targets: Tensor, queries: Tensor, answers: Tensor) -> Tensor:
        def inner(fast: Params) -> Tensor:
            return F.cross_entropy(plain_forward(fast, inputs), targets)

        fast = params
        for _ in range(steps):
            grads = grad(inner)(fast)
            fast = {name: p - RATE * grads[name] for name, p in fast.items()}
        return F.cross_entropy(plain_forward(fast, queries), answers)

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))

    def run(params: Params, episodes: list[Episode]) -> Params:
        pairs = ((e.support.inputs, e.support.targets, e.query.inputs, e.query.targets) for e in episodes)
        return {name: g.mean(0) for name, g in each(params, *map(torch.stack, zip(*pairs, strict=True))).items()}

    return run


def lean(case: Case, net: CmlNet) -> Contender | None:
    """With all means of saving memory, where no norm couples examples."""
    engine = Engine("adjoint", "sqrt", torch.device("cpu"))
    return None if couples_examples(net) else ours(case.steps, engine, net, micro_batch=5, rate=RATE)


def plain_loop(case: Case, net: CmlNet) -> Contender:
    return plain(case.steps, plain_forward if case.backbone == "conv4" else forward_of(net), RATE)


def compiled(mode: str | None) -> Callable[[Case, CmlNet], Contender | None]:
    """``engine.compile=on`` in a mode of torch.compile. Without a GPU traced alone, and once: there it is this script
    that is tried, and a compiler takes minutes."""

    def make(case: Case, net: CmlNet) -> Contender | None:
        said: list[str] = []
        on_gpu = torch.cuda.is_available()
        if mode and not on_gpu:
            return None
        compute = CompiledGradient("inductor" if on_gpu else "eager", mode, said.append)
        way = ours(case.steps, "graph", net, rate=RATE, compute=compute)

        def run(params: Params, episodes: list[Episode]) -> Params:
            found = way(params, episodes)
            if any(graph.run is None for graph in compute.graphs.values()):
                raise RuntimeError(said[-1])  # what would be timed is eager arithmetic
            return found

        return run

    return make


CONTENDERS: dict[str, Callable[[Case, CmlNet], Contender | None]] = {
    "plain": plain_loop,
    "plain, episodes batched": lambda case, net: batched(case.steps) if case.backbone == "conv4" else None,
    "ours, graph": lambda case, net: ours(case.steps, "graph", net, rate=RATE),
    "ours, adjoint": lambda case, net: ours(case.steps, "adjoint", net, rate=RATE),
    "ours, adjoint, lean": lean,
    "ours, compiled": compiled(None),
    "ours, reduce-overhead": compiled("reduce-overhead"),
}
"""By name. A way that gives None is not one for this network."""


# --------------------------------------------------------------------------- a case, in the process made for it


def built(case: Case, device: torch.device, dtype: torch.dtype) -> CmlNet:
    if case.backbone == "conv4":
        return network(case.pixels).to(device, dtype)
    shape = (3, case.pixels, case.pixels)
    net = build_net(ModelConfig(backbone=case.backbone), input_shape=shape, output_dim=WAYS, seed=0, colearner=False)
    return net.to(device, dtype)


def measure(case: Case, device: torch.device, small: bool) -> Iterator[dict]:
    """A row for each way."""
    exact: list[Tensor] = []
    for name, make in CONTENDERS.items():
        row = {"way": name}
        try:
            if make(case, built(case, torch.device("cpu"), torch.float32)) is None:
                continue
            else:
                row["error"] = error_of(case, make, device, exact)
                row |= cost_of(case, make, device, small)
        except Exception as error:  # keeps no other way from being measured
            row |= failure(error)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield row


def failure(error: Exception) -> dict:
    """What a row says of it; memory that ran out is an answer, and no fault."""
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return {"note": FULL}
    said = str(error).strip().partition("\n")[0][:100]
    return {"note": f"{type(error).__name__}: {said}", "failed": True}


def error_of(case: Case, make: Callable, device: torch.device, exact: list[Tensor]) -> float | None:
    """In float64, against the first that was computed; of that one None."""
    net = built(case, device, torch.float64)
    episodes = [episode.to(device) for episode in make_episodes(case.pixels, torch.float64, 1, 2)[:2]]
    found = flat(make(case, net)({n: p.detach() for n, p in net.named_parameters()}, episodes))
    if not exact:
        exact.append(found)
        return None
    return ((found - exact[0]).norm() / exact[0].norm()).item()


def cost_of(case: Case, make: Callable, device: torch.device, small: bool) -> dict:
    """Seconds and memory of a meta-step in float32."""
    net = built(case, device, torch.float32)
    way, params = make(case, net), {n: p.detach() for n, p in net.named_parameters()}
    examples, rounds = ((1, 2), 1) if small else ((SHOTS, QUERIES), ROUNDS)
    episodes = [episode.to(device) for episode in make_episodes(case.pixels, torch.float32, *examples)]

    def step() -> None:
        way(params, episodes)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()  # libraries are loaded, kernels chosen, code compiled
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
    times: list[float] = []
    while not times or (len(times) < rounds and sum(times) < ROUNDS_S):
        times.append(seconds(step))
    found = {"seconds": statistics.median(times), "fastest": min(times), "rounds": len(times)}
    if device.type == "cuda":
        found["gib"] = (torch.cuda.max_memory_allocated() - level) / 2**30
    return found


# --------------------------------------------------------------------------- the largest ViT


def full_step(backbone: str, micro_batch: int, device: torch.device, small: bool) -> dict:
    """A meta-step from parameters to parameters, the second of two."""
    from vit_base import SHAPE, configured, episode, score

    steps, examples = (2, (1, 1)) if small else (5, (SHOTS, QUERIES))
    config = configured(steps, [f"model.backbone={backbone}", "run.precision=bf16"])
    with torch.device("meta"):
        net = make_network(config, SHAPE, WAYS, structure_only=True)
    engine = Engine("adjoint", "sqrt", torch.device("cpu"))
    means = {"micro_batch": micro_batch, "autocast": torch.bfloat16}
    model = MetaModel(net, F.cross_entropy, score, method_of(config, net), engine, **means).to_empty(device=device)
    with torch.no_grad():
        for name, value in zip(model.names, model.values, strict=True):
            if value.ndim > 1:
                value.normal_(std=0.02)
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
    optimizer = torch.optim.SGD(model.values, lr=1e-3)
    made = episode(torch.float32, *examples).to(device)

    def step() -> float:
        model([made], 1.0)[0].backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.values])
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()  # the device is done

    norms = [step()]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = seconds(lambda: norms.append(step()))
    if not all(map(math.isfinite, norms)):
        raise ValueError(f"the meta-gradient is not finite: {norms}")
    images = sum(len(batch.targets) for batch in made.batches)
    size = sum(p.numel() for p in model.values)
    found = {"parameters": size, "steps": steps, "images": images, "seconds": took, "norm": norms[-1]}
    if device.type == "cuda":
        found["gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


# --------------------------------------------------------------------------- all cases, in time


class Clock:
    """What is left of the minutes; a process may take half of them."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self._end_s = minutes, time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def in_fresh_process(self, words: list[str]) -> tuple[list[dict], str]:
        """The rows that a process of this script gave, and why there are no more of them (empty: that is all)."""
        if self.left_s < LEAST_S:
            return [], f"left out: {self.minutes:g} minutes were over"
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            command = [sys.executable, "-W", "ignore", __file__, *words]
            try:
                limit_s = min(self.left_s, 30 * self.minutes)
                code = subprocess.run(command, stdout=out, stderr=err, timeout=limit_s).returncode
                ended = f"the process failed with {code}" if code else ""
            except subprocess.TimeoutExpired:
                ended = f"took longer than {limit_s:.0f} s"
            for file in (out, err):
                file.seek(0)
            rows = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
            last = err.read().strip().splitlines()[-1:]
        return rows, f"{ended}: {last[0][:100]}" if ended.startswith("the process") and last else ended


def table_of(case: Case, clock: Clock, words: list[str]) -> list[dict]:
    """The rows of a case, with how many times as fast as the plain loop each is."""
    rows, ended = clock.in_fresh_process([*words, "--case", json.dumps(astuple(case))])
    if ended:
        rows.append({"way": "the others" if rows else "all", "note": ended, "failed": "failed" in ended})
    base = next((row.get("seconds") for row in rows if row["way"] == "plain"), None)
    for row in rows:
        row |= {"backbone": case.backbone, "pixels": case.pixels, "steps": case.steps}
        if base and "seconds" in row:
            row["ratio"] = base / row["seconds"]
    return rows


def largest(clock: Clock, words: list[str], names: list[str], say: Callable[[str], None]) -> list[dict]:
    """A row for each try, from the largest network and micro-batch down; the last one is that which fits, if any."""
    rows: list[dict] = []
    for name in names:
        for size in MICRO_BATCHES:
            found, ended = clock.in_fresh_process([*words, "--vit", name, str(size)])
            row = {"backbone": name, "micro_batch": size, "note": ended or "fits", **(found[0] if found else {})}
            rows.append(row)
            say(f"{name} in micro-batches of {size}: {row['note']}")
            if row["note"] == "fits":
                return rows
            if row["note"] != FULL:  # fewer examples at once would not help
                break
    return rows


def shown(row: dict, key: str, form: str) -> str:
    return format(row[key], form) if row.get(key) is not None else "-"


def show(console: Console, rows: list[dict], vits: list[dict]) -> None:
    cells, before = [], ""
    for row in rows:
        case = f"{row['backbone']} {row['pixels']} px, K = {row['steps']}"
        forms = {"seconds": ".4f", "ratio": ".2f", "gib": ".3f", "error": ".0e"}
        numbers = (shown(row, *how) for how in forms.items())
        cells.append((case if case != before else "", row["way"], *numbers, row.get("note", "")))
        before = case
    if rows:
        columns = ("network", "way", "s a meta-step", "plain / this", "GiB", "error in float64", "")
        console.table(f"Meta-steps of {EPISODES} episodes", columns, cells)
    fast = {}
    for row in rows:
        if row["backbone"] == "conv4" and "ratio" in row and row["way"].startswith("ours"):
            key = f"{row['pixels']} px, K = {row['steps']}"
            fast[key] = max(fast.get(key, 0.0), row["ratio"])
    if fast:
        told = "; ".join(f"{key}: {ratio:.2f}" for key, ratio in fast.items())
        console.note(f"Conv-4, the fastest of ours beside the plain loop (wanted: {TARGET:g}): {told}\n")
    if vits:
        columns = ("network", "parameters", "K", "micro-batch", "images", "GiB", "s", "")
        forms = {"parameters": ",d", "steps": "d", "micro_batch": "d", "images": "d", "gib": ".2f", "seconds": ".1f"}
        cells = [(row["backbone"], *(shown(row, *how) for how in forms.items()), row["note"]) for row in vits]
        console.table("The largest ViT: a meta-step of CML with one episode, bfloat16", columns, cells)


def child(asked: argparse.Namespace) -> None:
    device = gpu_arithmetic() if asked.device == "cuda" else torch.device("cpu")
    if asked.small:
        torch.set_num_threads(1)
    if asked.case:
        for row in measure(Case(*json.loads(asked.case)), device, asked.small):
            print(json.dumps(row), flush=True)
        return
    try:
        row = full_step(asked.vit[0], int(asked.vit[1]), device, asked.small)
    except Exception as error:
        row = failure(error)
    print(json.dumps(row))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks and images: a test of this script")
    parser.add_argument("--minutes", type=float, default=10.0, help="nothing runs longer; what is left out is said")
    parser.add_argument("--only", default="", help=f"cases whose name contains this, e.g. conv4 or '{LARGEST}'")
    parser.add_argument("--out", type=Path, help="the same as JSON, with the fastest time of each besides")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--vit", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case or asked.vit:
        child(asked)
        return 0
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --small shows that the script works")
    console, clock, rows, vits = Console(), Clock(asked.minutes), [], []
    where = torch.cuda.get_device_name() if asked.device == "cuda" else "the CPU"
    console.note(f"torch {torch.__version__} on {where}; {asked.minutes:g} minutes at most")
    words = ["--device", asked.device, *["--small"] * asked.small]
    names = ["test_vit"] if asked.small else [f"vit_{name}_224" for name in VITS]
    try:
        for case in SMALL_CASES if asked.small else CASES:
            if asked.only not in str(case):
                continue
            if isinstance(case, Case):
                rows += table_of(case, clock, words)
                console.note(f"{case}: {max(clock.left_s, 0):.0f} s left after it")
            else:
                vits = largest(clock, words, names, console.note)
    finally:  # also of a check that was stopped
        show(console, rows, vits)
        if asked.out:
            about = {"device": where, "torch": torch.__version__}
            asked.out.write_text(json.dumps({**about, "rows": rows, "largest": vits}, indent=1) + "\n")
    names = [(f"{row['backbone']} {row['pixels']} px, K = {row['steps']}, {row['way']}", row) for row in rows]
    wrong = [name for name, row in names if not (row.get("error") or 0.0) < PARITY]
    failed = [name for name, row in names if row.get("failed")] + [row["backbone"] for row in vits if row.get("failed")]
    if wrong:
        console.error(f"other gradients than the plain loop's: {'; '.join(wrong)}")
    if failed:
        console.error(f"failed: {'; '.join(failed)}")
    return int(bool(wrong or failed))


if __name__ == "__main__":
    sys.exit(main())
