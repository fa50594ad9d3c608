"""Peak memory and seconds of one meta-gradient, each case in a fresh process: backbones, engines, steps, micro-batches.

    python benchmarks/memory.py                                  # the table of benchmarks/2026-11-25-memory.md
    python benchmarks/memory.py --only vit_tiny_patch16_224 --threads 1
    python benchmarks/memory.py --cuda                           # on a GPU, and larger cases besides

Memory is the largest resident set above its level after the model is built; on a GPU the largest sum of live tensors
and workspaces, as torch counts it, and the seconds are those of the second meta-gradient. ``unroll`` is what one would
write without this package: a plain loop of ``torch.autograd.grad(..., create_graph=True)`` over one copy of the
network, all graphs alive until the outer backward; ``checkpoint`` is the same with a non-reentrant checkpoint round
each inner step; ``bf16`` computes in bfloat16. 5-way 5-shot, 15 queries a class, CML with a co-learner of depth 1.
Gradients of one backbone and number of steps are compared with the first case that ran: the last column is the relative
distance (float32).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = [
    # backbone, pixels, inner steps, engine, micro-batch, episodes
    ("conv4", 84, 1, "unroll", 0, 1),
    ("conv4", 84, 1, "graph", 0, 1),
    ("conv4", 84, 1, "adjoint", 0, 1),
    ("conv4", 84, 5, "unroll", 0, 1),
    ("conv4", 84, 5, "adjoint", 0, 1),
    ("conv4", 84, 5, "adjoint", 0, 4),
    ("resnet18", 84, 1, "unroll", 0, 1),
    ("resnet18", 84, 1, "adjoint", 0, 1),
    ("resnet18", 84, 5, "unroll", 0, 1),
    ("resnet18", 84, 5, "adjoint", 0, 1),
    ("vit_tiny_patch16_224", 224, 1, "unroll", 0, 1),
    ("vit_tiny_patch16_224", 224, 1, "adjoint", 0, 1),
    ("vit_tiny_patch16_224", 224, 1, "adjoint", 5, 1),
    ("vit_tiny_patch16_224", 224, 1, "adjoint", 1, 1),
    ("vit_tiny_patch16_224", 224, 5, "unroll", 0, 1),
    ("vit_tiny_patch16_224", 224, 5, "checkpoint", 0, 1),
    ("vit_tiny_patch16_224", 224, 5, "adjoint", 0, 1),
    ("vit_tiny_patch16_224", 224, 5, "adjoint", 5, 1),
    ("vit_tiny_patch16_224", 224, 5, "adjoint", 3, 1),
    ("vit_tiny_patch16_224", 224, 5, "adjoint", 1, 1),
    ("vit_small_patch16_224", 224, 1, "unroll", 0, 1),
    ("vit_small_patch16_224", 224, 1, "adjoint", 0, 1),
    ("vit_small_patch16_224", 224, 1, "adjoint", 5, 1),
    ("vit_small_patch16_224", 224, 1, "adjoint", 1, 1),
    ("vit_small_patch16_224", 224, 5, "adjoint", 5, 1),
    ("vit_small_patch16_224", 224, 5, "adjoint", 3, 1),
]
GPU_CASES = [
    ("conv4", 84, 1, "adjoint bf16", 0, 1),
    ("vit_tiny_patch16_224", 224, 5, "adjoint bf16", 0, 1),
    ("vit_small_patch16_224", 224, 5, "unroll", 0, 1),
    ("vit_small_patch16_224", 224, 5, "adjoint", 0, 1),
    ("vit_base_patch16_224", 224, 5, "unroll", 0, 1),
    ("vit_base_patch16_224", 224, 5, "adjoint", 0, 1),
    ("vit_base_patch16_224", 224, 5, "adjoint", 25, 1),
    ("vit_base_patch16_224", 224, 5, "adjoint", 5, 1),
    ("vit_base_patch16_224", 224, 5, "adjoint bf16", 25, 1),
    ("vit_large_patch16_224", 224, 5, "unroll", 0, 1),
    ("vit_large_patch16_224", 224, 5, "adjoint", 25, 1),
    ("vit_large_patch16_224", 224, 5, "adjoint", 5, 1),
]
WAYS, SHOTS, QUERIES = 5, 5, 15
INNER_LR = 0.01


def measure(
    backbone: str,
    pixels: int,
    steps: int,
    engine: str,
    micro_batch: int,
    episodes: int,
    *,
    threads: int,
    freed: str,
    device: str,
):
    """Run in a fresh process: one meta-gradient, after the level was taken. Returns the numbers and the gradient."""
    import torch
    from plan import gpu_arithmetic

    from cml_dist.config.schema import ModelConfig
    from cml_dist.distributed.allocator import give_back_freed_memory, keep_freed_memory
    from cml_dist.meta.model import MetaModel
    from cml_dist.meta.rule import Method
    from cml_dist.nets.build import build_net
    from cml_dist.types import Batch, Episode

    if device == "cuda":
        gpu_arithmetic()
    torch.set_num_threads(threads)
    (keep_freed_memory if freed == "keep" else give_back_freed_memory)()
    shape = (3, pixels, pixels)
    config = ModelConfig(backbone=backbone, colearner={"depth": 2 if backbone == "conv4" else 1})
    net = build_net(config, input_shape=shape, output_dim=WAYS, seed=0, colearner=True).to(device)

    def score(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.argmax(1) == targets).float().mean()

    def batch(generator: torch.Generator, count: int) -> Batch:
        inputs = torch.randn(count * WAYS, *shape, generator=generator)
        return Batch(inputs.to(device), torch.arange(WAYS).repeat_interleave(count).to(device))

    def episode(index: int) -> Episode:
        generator = torch.Generator().manual_seed(index)
        return Episode(batch(generator, SHOTS), batch(generator, QUERIES), "train", index)

    if engine in ("unroll", "checkpoint"):
        work = _unroll(net, steps, checkpoint=engine == "checkpoint")
    else:
        method = Method.sgd(steps, INNER_LR, INNER_LR, 1.0)
        loss = torch.nn.functional.cross_entropy
        name, _, compute = engine.partition(" ")
        autocast = torch.bfloat16 if compute else None
        model = MetaModel(net, loss, score, method, name, micro_batch=micro_batch or None, autocast=autocast)
        del net

        def work(made):
            model(made, 1 / episodes)[0].backward()
            grads = [p.grad for p in model.values]
            model.zero_grad(set_to_none=True)
            return grads

    made = (episode(index) for index in range(episodes))
    if device == "cuda":
        work([episode(0)])  # libraries are loaded, and their kernels chosen
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    level = torch.cuda.memory_allocated() if device == "cuda" else 1024 * _resident_kib("VmRSS")
    started = time.perf_counter()
    grads = work(made)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * _resident_kib("VmHWM")
    whole = torch.cat([g.flatten() for g in grads]).cpu()
    return {"level_gib": level / 2**30, "above_gib": (peak - level) / 2**30, "seconds": seconds}, whole


def _unroll(net, steps: int, *, checkpoint: bool):
    """MAML and the co-learner as one differentiable expression: the full unroll, nothing of the package's core."""
    import torch
    from torch.func import functional_call
    from torch.utils.checkpoint import checkpoint as recompute

    params = dict(net.named_parameters())
    adapting = [n for n in params if not n.startswith("colearner.")]

    def inner_step(support, *fast):
        with torch.enable_grad():
            (outputs,) = functional_call(net, dict(zip(adapting, fast, strict=True)), (support.inputs,))
            loss = torch.nn.functional.cross_entropy(outputs, support.targets)
            grads = torch.autograd.grad(loss, fast, create_graph=True)
        return tuple(p - INNER_LR * g for p, g in zip(fast, grads, strict=True))

    def work(made):
        for episode in made:
            fast = tuple(params[n] for n in adapting)
            for _ in range(steps):
                step = (episode.support, *fast)
                fast = recompute(inner_step, *step, use_reentrant=False) if checkpoint else inner_step(*step)
            state = {**params, **dict(zip(adapting, fast, strict=True))}
            outputs = functional_call(net, state, (episode.query.inputs,), {"learners": ("meta", "co")})
            loss = sum(torch.nn.functional.cross_entropy(out, episode.query.targets) for out in outputs)
            grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        return grads

    return work


def _resident_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and seconds of one meta-gradient, fresh process each.")
    parser.add_argument("--only", help="backbones whose name contains this")
    parser.add_argument("--steps", type=int, help="only this number of inner steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--freed",
        choices=["keep", "give-back"],
        default="keep",
        help="freed memory: kept for speed (the trainer's default), or given back (its way with memory.budget_gib)",
    )
    parser.add_argument("--cuda", action="store_true", help="on the first GPU")
    parser.add_argument("--engines", help="only these, e.g. unroll,adjoint")
    parser.add_argument("--case", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--grads", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        import torch

        backbone, pixels, steps, engine, micro_batch, episodes = args.case
        case = backbone, int(pixels), int(steps), engine, int(micro_batch), int(episodes)
        device = "cuda" if args.cuda else "cpu"
        numbers, grads = measure(*case, threads=args.threads, freed=args.freed, device=device)
        torch.save(grads, args.grads)
        print(json.dumps(numbers))
        return
    print("| backbone | px | K | engine | micro-batch | episodes | GiB above the model | s | distance |")
    print("|---|---|---|---|---|---|---|---|---|")
    references: dict[tuple, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in [*CASES, *(GPU_CASES if args.cuda else [])]:
            wanted = (not args.only or args.only in case[0]) and args.steps in (None, case[2])
            wanted = wanted and (not args.engines or case[3] in args.engines.split(","))
            if wanted:
                _row(case, args, Path(folder) / "grads.pt", references)


def _row(case: tuple, args: argparse.Namespace, path: Path, references: dict) -> None:
    import torch

    command = [sys.executable, __file__, "--threads", str(args.threads), "--freed", args.freed]
    command += ["--grads", str(path), *(["--cuda"] if args.cuda else []), "--case", *map(str, case)]
    out = subprocess.run(command, capture_output=True, text=True)
    backbone, pixels, steps, engine, micro_batch, episodes = case
    row = f"| {backbone} | {pixels} | {steps} | {engine} | {micro_batch or 'all'} | {episodes} |"
    if out.returncode:
        why = "out of memory" if "OutOfMemoryError" in out.stderr else f"failed ({out.returncode})"
        print(f"{row} {why} | | |", flush=True)
        return
    got, grads = json.loads(out.stdout.splitlines()[-1]), torch.load(path)
    first = references.setdefault((backbone, pixels, steps, episodes), grads)
    distance = "-" if first is grads else f"{((grads - first).norm() / first.norm()).item():.0e}"
    print(f"{row} {got['above_gib']:.2f} | {got['seconds']:.{2 if args.cuda else 1}f} | {distance} |", flush=True)


if __name__ == "__main__":
    main()
