"""Predicted against measured peak memory of a meta-step on the CPU, each case in a fresh process.

    python benchmarks/plan.py                    # all cases, with three settings of the C library's allocator
    python benchmarks/plan.py resnet18 vit_tiny  # those whose backbone begins so

Predicted: `meta_step_footprint`, which runs the same MetaModel on tensors without storage. Measured: the largest
resident set above its level after the model was built and the libraries were warm (a small network has run), with

- ``given back``: each tensor is mapped by itself, freed memory goes back at once (the trainer's choice for a budget),
- ``kept``: freed memory stays in the process (the trainer's choice for speed),
- ``default``: glibc as it is.

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
ALLOCATORS = ("given back", "kept", "default")
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
    from cml_dist.meta.problem import Method

    return Method(inner_steps, 0.01, 0.01, 1.0)


def meta_model(backbone: str, px: int, inner_steps: int, engine: str, micro_batch: int | None):
    import torch

    from cml_dist.meta.model import MetaModel

    loss = torch.nn.functional.cross_entropy
    return MetaModel(build(backbone, px), loss, score, method(inner_steps), engine, micro_batch=micro_batch)


def predict(backbone: str, px: int, inner_steps: int, engine: str, micro_batch: int | None) -> dict[str, float]:
    import torch

    from cml_dist.planning.footprint import meta_step_footprint

    with torch.device("meta"):
        net = build(backbone, px)
    started = time.perf_counter()
    loss, of_one = torch.nn.functional.cross_entropy, episode(px, SHOTS, QUERIES, "meta")
    found = meta_step_footprint(net, loss, score, method(inner_steps), engine, of_one, micro_batch=micro_batch)
    return {"gib": found.peak / 2**30, "seconds": time.perf_counter() - started}


def measure(
    backbone: str, px: int, inner_steps: int, engine: str, micro_batch: int | None, allocator: str
) -> dict[str, float]:
    import torch

    from cml_dist.parallel.allocator import give_back_freed_memory, keep_freed_memory

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


def status(key: str) -> int:
    """A size of this process, KiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def in_fresh_process(*words: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--", *(str(word) for word in words)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    return json.loads(out.stdout.splitlines()[-1])


def main(wanted: list[str]) -> None:
    names = " | ".join(f"{name}, GiB (error)" for name in ALLOCATORS)
    print(f"| backbone | px | K | engine | micro-batch | predicted, GiB | in s | {names} | meta-step, s |")
    print("|---" * (8 + len(ALLOCATORS)) + "|")
    for case in CASES:
        if wanted and not case[0].startswith(tuple(wanted)):
            continue
        guess = in_fresh_process(*case)
        cells = []
        for allocator in ALLOCATORS:
            got = in_fresh_process(*case, allocator)
            cells.append(f"{got['gib']:.3f} ({guess['gib'] / got['gib'] - 1:+.1%})")
            seconds = got["seconds"]
        *shape, micro_batch = case
        row = [*shape, micro_batch or "-", f"{guess['gib']:.3f}", f"{guess['seconds']:.1f}", *cells, f"{seconds:.1f}"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--"]:
        backbone, px, inner_steps, engine, micro_batch, *allocator = sys.argv[2:]
        case = backbone, int(px), int(inner_steps), engine, None if micro_batch == "None" else int(micro_batch)
        print(json.dumps(measure(*case, *allocator) if allocator else predict(*case)))
    else:
        main(sys.argv[1:])
