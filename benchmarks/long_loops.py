"""Many inner steps with adjoint: every point kept, or about every sqrt(K)-th: memory, time, and the same gradient.

    python benchmarks/long_loops.py --steps 200 --pairs 3

Conv-4 at 28 px, 5-way 1-shot, 5 queries a class, with the co-learner; one thread, CPU seconds, in turn in one process.
Memory is that of live tensors at their peak, counted as they come and go.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from cml_dist.config.schema import ModelConfig
from cml_dist.distributed.allocator import keep_freed_memory
from cml_dist.memory.live_bytes import LiveBytes
from cml_dist.meta.gradient import Engine, points_held
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import Method
from cml_dist.nets.build import build_net
from cml_dist.types import Batch, Episode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)

    def batch(each: int) -> Batch:
        return Batch(torch.randn(5 * each, 1, 28, 28), torch.arange(5).repeat_interleave(each))

    episode = Episode(batch(1), batch(5), "train", 0, ways=5)
    net = build_net(ModelConfig(), input_shape=(1, 28, 28), output_dim=5, seed=0, colearner=True)
    loss = torch.nn.functional.cross_entropy
    method = Method.sgd(args.steps, 0.01, 0.01, 1.0)
    ways = {kept: Engine("adjoint", kept) for kept in ("all", "sqrt")}
    models = {kept: MetaModel(net, loss, lambda o, t: o.sum(), method, way) for kept, way in ways.items()}
    seconds: dict[str, list[float]] = {kept: [] for kept in models}
    grads, peaks = {}, {}
    for _ in range(args.pairs):
        for kept, model in models.items():
            began = time.process_time()
            model(iter([episode]), 1.0)[0].backward()
            seconds[kept].append(time.process_time() - began)
            grads[kept] = torch.cat([p.grad.flatten() for p in model.values])
            model.zero_grad(set_to_none=True)
    for kept, model in models.items():
        with LiveBytes() as live:
            live.standing([*model.parameters(), *model.buffers()])
            model(iter([episode]), 1.0)[0].backward()
        model.zero_grad(set_to_none=True)
        peaks[kept] = live.peak / 2**20
    print("| points kept | copies of what adapts | CPU s (median) | peak of live tensors, MiB |\n|---|---|---|---|")
    for kept in models:
        held = points_held(args.steps, kept)
        print(f"| {kept} | {held} | {statistics.median(seconds[kept]):.2f} | {peaks[kept]:.1f} |")
    ratios = [b / a for a, b in zip(seconds["all"], seconds["sqrt"], strict=True)]
    print(
        f"time, pair by pair: {statistics.median(ratios):.2f}; the same gradient to the bit: "
        f"{torch.equal(grads['all'], grads['sqrt'])}"
    )


if __name__ == "__main__":
    main()
