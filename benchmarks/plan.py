"""Predicted against measured peak memory of a meta-step, each case in a fresh process.

    python benchmarks/plan.py                    # all cases, with three settings of the C library's allocator
    python benchmarks/plan.py resnet18 vit_tiny  # those whose backbone begins so
    python benchmarks/plan.py --cuda             # on a GPU, and larger cases besides

Predicted: `meta_step_footprint`, which runs the same MetaModel on tensors without storage. Measured on the CPU: the
largest resident set above its level after the model was built and the libraries were warm (a small network has run),
with

- ``given back``: each tensor is mapped by itself, freed memory goes back at once (the trainer's choice for a budget),
- ``kept``: freed memory stays in the process (the trainer's choice for speed),
- ``default``: glibc as it is.

On a GPU: ``allocated``, the largest sum of live tensors and workspaces above its level after the same, and
``reserved``, what the caching allocator held of the GPU then (both are torch's own counts).

5-way 5-shot, 15 queries a class, one episode, one thread.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time

CASES = [
    # backbone, px, inner steps, engine, micro-batch
    ("conv4", 84, 1, "graph", None),
    ("conv4", 84, 5, "graph", None),
    ("conv4", 84, 5, "adjoint", None),
    ("resnet12", 32, 1, "graph", None),
    ("resnet18", 84, 1, "graph", None),
    ("resnet18", 84, 5, "graph", None),
    ("resnet18", 84, 5, "adjoint", None),
    ("convnext_atto", 96, 5, "adjoint", 5),
    ("vit_tiny_patch16_224", 224, 1, "graph", None),
    ("vit_tiny_patch16_224", 224, 1, "adjoint", None),
    ("vit_tiny_patch16_224", 224, 5, "adjoint", 5),
    ("vit_tiny_patch16_224", 224, 5, "adjoint", 1),
    ("vit_small_patch16_224", 224, 2, "adjoint", 5),
]
GPU_CASES = [
    ("conv4", 84, 10, "adjoint", None),
    ("resnet50", 224, 5, "adjoint", None),
    ("vit_small_patch16_224", 224, 5, "graph", None),
    ("vit_base_patch16_224", 224, 5, "adjoint", None),
    ("vit_base_patch16_224", 224, 5, "adjoint", 5),
]
ALLOCATORS = ("given back", "kept", "default")
GPU_COUNTS = ("allocated", "reserved")
SHOTS, QUERIES, WAYS = 5, 15, 5


def build(backbone: str, px: int):
    from cml_dist.config.schema import ModelConfig
    from cml_dist.nets.build import build_net

    config = ModelConfig(backbone=backbone)
    return build_net(config, input_shape=(3, px, px), output_dim=WAYS, seed=0, colearner=True)


def score(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def episode(px: int, shots: int, queries: int, device: str = "cpu"):
    import torch

    from cml_dist.types import Batch, Episode

    def batch(count: int) -> Batch:
        labels = torch.arange(WAYS, device=device).repeat_interleave(count, output_size=WAYS * count)
        return Batch(torch.randn(WAYS * count, 3, px, px, device=device), labels)

    return Episode(batch(shots), batch(queries), "train", 0)


def method(inner_steps: int):
    from cml_dist.meta.rule import Method

    return Method.sgd(inner_steps, 0.01, 0.01, 1.0)


def meta_model(backbone: str, px: int, inner_steps: int, engine: str, micro_batch: int | None):
    import torch

    from cml_dist.meta.model import MetaModel

    loss = torch.nn.functional.cross_entropy
    return MetaModel(build(backbone, px), loss, score, method(inner_steps), engine, micro_batch=micro_batch)


def predict(
    backbone: str, px: int, inner_steps: int, engine: str, micro_batch: int | None, *, scratch: bool = True
) -> dict[str, float]:
    """What :mod:`cml_dist.memory` says; ``scratch``: of the CPU's kernels too."""
    import torch

    from cml_dist.memory.footprint import meta_step_footprint

    with torch.device("meta"):
        net = build(backbone, px)
    started = time.perf_counter()
    loss, of_one = torch.nn.functional.cross_entropy, episode(px, SHOTS, QUERIES, "meta")
    options = {"micro_batch": micro_batch, "scratch": scratch}
    found = meta_step_footprint(net, loss, score, method(inner_steps), engine, of_one, **options)
    return {"gib": found.peak / 2**30, "seconds": time.perf_counter() - started}


def measure(
    backbone: str, px: int, inner_steps: int, engine: str, micro_batch: int | None, allocator: str
) -> dict[str, float]:
    import torch

    from cml_dist.distributed.allocator import give_back_freed_memory, keep_freed_memory

    {"given back": give_back_freed_memory, "kept": keep_freed_memory, "default": lambda: None}[allocator]()
    torch.set_num_threads(1)
    model = meta_model(backbone, px, inner_steps, engine, micro_batch)
    # What the first convolution and the first attention load into the process is not the model's.
    for small in ("conv4", "test_vit"):
        warm = meta_model(small, 32 if small == "conv4" else 160, 2, engine, None)
        warm([episode(32 if small == "conv4" else 160, 1, 1)], 1.0)[0].backward()
        del warm
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    level = status("VmRSS")
    started = time.perf_counter()
    loss, _ = model((episode(px, SHOTS, QUERIES) for _ in range(1)), 1.0, frozenset({0}))  # as the trainer does
    loss.backward()
    seconds = time.perf_counter() - started
    return {"gib": (status("VmHWM") - level) / 2**20, "seconds": seconds}


def measure_on_gpu(
    backbone: str, px: int, inner_steps: int, engine: str, micro_batch: int | None
) -> dict[str, float]:
    import torch

    device = gpu_arithmetic()
    model = meta_model(backbone, px, inner_steps, engine, micro_batch).to(device)
    made = episode(px, SHOTS, QUERIES)
    for small in ("conv4", "test_vit"):
        warm = meta_model(small, 32 if small == "conv4" else 160, 2, engine, None).to(device)
        warm([episode(32 if small == "conv4" else 160, 1, 1, "cuda")], 1.0)[0].backward()
        del warm
    gc.collect()
    torch.cuda.empty_cache()
    level, kept = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(2):  # the second is warm
        started = time.perf_counter()
        loss, _ = model((made.to(device) for _ in range(1)), 1.0, frozenset({0}))
        loss.backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        for p in model.values:
            p.grad = None
        del loss
    return {
        "allocated": (torch.cuda.max_memory_allocated() - level) / 2**30,
        "reserved": (torch.cuda.max_memory_reserved() - kept) / 2**30,
        "seconds": seconds[-1],
    }


def gpu_arithmetic(precision: str = "fp32"):
    """The first GPU, computing as the trainer does under ``run.precision`` (deterministic kernels)."""
    import torch

    from cml_dist.config.load import parse_config
    from cml_dist.distributed.world import World, set_arithmetic

    device = torch.device("cuda", 0)
    world = World(accelerator=None, rank=0, size=1, local_rank=0, local_size=1, device=device)
    set_arithmetic(parse_config({"domain": {"name": "sinusoid"}, "run": {"precision": precision}}), world)
    return device


def status(key: str) -> int:
    """A size of this process, KiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def in_fresh_process(*words: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--", *(str(word) for word in words)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    return json.loads(out.stdout.splitlines()[-1])


def main(wanted: list[str], cuda: bool) -> None:
    columns = GPU_COUNTS if cuda else ALLOCATORS
    names = " | ".join(f"{name}, GiB (error)" for name in columns)
    print(f"| backbone | px | K | engine | micro-batch | predicted, GiB | in s | {names} | meta-step, s |")
    print("|---" * (8 + len(columns)) + "|")
    for case in [*CASES, *(GPU_CASES if cuda else [])]:
        if wanted and not case[0].startswith(tuple(wanted)):
            continue
        guess = in_fresh_process(*case, *(["predict for a GPU"] if cuda else []))
        if cuda:
            got = in_fresh_process(*case, "cuda")
            found, seconds = {name: got[name] for name in columns}, got["seconds"]
        else:
            runs = {allocator: in_fresh_process(*case, allocator) for allocator in columns}
            found, seconds = {name: got["gib"] for name, got in runs.items()}, runs[columns[-1]]["seconds"]
        cells = [f"{gib:.3f} ({guess['gib'] / gib - 1:+.1%})" for gib in found.values()]
        *shape, micro_batch = case
        row = [*shape, micro_batch or "-", f"{guess['gib']:.3f}", f"{guess['seconds']:.1f}", *cells, f"{seconds:.2f}"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def one(backbone: str, px: str, inner_steps: str, engine: str, micro_batch: str, how: str = "") -> dict[str, float]:
    """A case, in the process that was made for it."""
    case = backbone, int(px), int(inner_steps), engine, None if micro_batch == "None" else int(micro_batch)
    if how == "cuda":
        return measure_on_gpu(*case)
    return measure(*case, how) if how in ALLOCATORS else predict(*case, scratch=not how)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--"]:
        print(json.dumps(one(*sys.argv[2:])))
    else:
        words = sys.argv[1:]
        main([word for word in words if word != "--cuda"], "--cuda" in words)
