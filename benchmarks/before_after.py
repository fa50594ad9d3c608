"""Time and memory of one meta-gradient at another commit and in this working tree, in turn, fresh processes each.

    python benchmarks/before_after.py d81044a --pairs 5
    python benchmarks/before_after.py d81044a --pairs 3 --only vit_tiny

Each process builds the network, computes one meta-gradient to warm up, and reports the fastest of the next ones (CPU
seconds), and the bytes of live tensors at the peak of a further one (counted as they come and go, so that a percent is
a percent). The ratio is taken pair by pair, its median told. 5-way 5-shot, 15 queries a class, CML with a co-learner,
one thread, freed memory kept as in training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    # name: backbone, pixels, inner steps, engine, micro-batch, meta-gradients that are timed
    "conv4 32 px, K = 1, graph": ("conv4", 32, 1, "graph", None, 8),
    "conv4 32 px, K = 5, graph": ("conv4", 32, 5, "graph", None, 4),
    "conv4 32 px, K = 5, adjoint": ("conv4", 32, 5, "adjoint", None, 4),
    "resnet12 32 px, K = 1, graph": ("resnet12", 32, 1, "graph", None, 1),
    "resnet18 32 px, K = 1, graph": ("resnet18", 32, 1, "graph", None, 1),
    "vit_tiny 224 px, K = 5, adjoint, micro-batch 5": ("vit_tiny_patch16_224", 224, 5, "adjoint", 5, 1),
}
WAYS, SHOTS, QUERIES = 5, 5, 15


def measure(backbone: str, pixels: int, steps: int, engine: str, micro_batch: int | None, repeats: int) -> None:
    """In a fresh process, of whichever package is first on the path."""
    import time

    import torch

    from cml_dist.config.schema import ModelConfig
    from cml_dist.distributed.allocator import keep_freed_memory
    from cml_dist.memory.live_bytes import LiveBytes
    from cml_dist.meta.model import MetaModel
    from cml_dist.nets.build import build_net
    from cml_dist.types import Batch, Episode

    try:
        from cml_dist.meta.rule import Method

        make = Method.sgd
    except ImportError:  # before 2026-11-28
        from cml_dist.meta.problem import Method as make
    torch.set_num_threads(1)
    keep_freed_memory()
    config = ModelConfig(backbone=backbone, colearner={"depth": 2 if backbone == "conv4" else 1})
    net = build_net(config, input_shape=(3, pixels, pixels), output_dim=WAYS, seed=0, colearner=True)
    loss = torch.nn.functional.cross_entropy

    def batch(each: int) -> Batch:
        generator = torch.Generator().manual_seed(each)
        return Batch(
            torch.randn(each * WAYS, 3, pixels, pixels, generator=generator), torch.arange(WAYS).repeat_interleave(each)
        )

    def score(outputs, targets):
        return (outputs.argmax(1) == targets).float().mean()

    episode = Episode(batch(SHOTS), batch(QUERIES), "train", 0)
    model = MetaModel(net, loss, score, make(steps, 0.01, 0.01, 1.0), engine, micro_batch=micro_batch)

    def work() -> float:
        began = time.process_time()  # of this one thread: other work on the machine counts less than by the clock
        model(iter([episode]), 1.0)[0].backward()
        seconds = time.process_time() - began
        model.zero_grad(set_to_none=True)
        return seconds

    if repeats > 1:
        work()
    seconds = min(work() for _ in range(repeats))
    with LiveBytes() as live:
        live.standing([*model.parameters(), *model.buffers(), episode.support.inputs, episode.query.inputs])
        work()
    print(json.dumps({"seconds": seconds, "mib": live.peak / 2**20}))


def one(package: Path, name: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, __file__, "here", "--case", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        measure(*CASES[args.case])
        return
    print("| case | s before | s after | ratio, median (least to most) | MiB before | MiB after | ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(base), args.base], check=True)
        try:
            for name in (name for name in CASES if args.only in name):
                pairs = [(one(base, name), one(ROOT, name)) for _ in range(args.pairs)]
                before, after = ([pair[side] for pair in pairs] for side in (0, 1))
                ratios = sorted(a["seconds"] / b["seconds"] for b, a in pairs)
                seconds = [statistics.median(x["seconds"] for x in side) for side in (before, after)]
                mib = [side[0]["mib"] for side in (before, after)]
                print(
                    f"| {name} | {seconds[0]:.3f} | {seconds[1]:.3f} | {statistics.median(ratios):.3f} "
                    f"({ratios[0]:.3f} to {ratios[-1]:.3f}) | {mib[0]:.1f} | {mib[1]:.1f} | {mib[1] / mib[0]:.3f} |",
                    flush=True,
                )
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(base)], check=True)


if __name__ == "__main__":
    main()
