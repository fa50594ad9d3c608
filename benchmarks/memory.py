"""Peak memory and seconds of one meta-step, each case in a fresh process: engines, inner steps, episodes.

    python benchmarks/memory.py

Memory is the largest resident set above its level after the model is built (the first line of the table says what that
level is); Conv-4 at 84 px, 5-way 5-shot, 15 queries a class, one thread, on the CPU.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

CASES = [
    ("graph", 1, 1),
    ("adjoint", 1, 1),
    ("graph", 5, 1),
    ("adjoint", 5, 1),
    ("graph", 1, 4),
    ("adjoint", 5, 4),
]


def measure(engine: str, inner_steps: int, episodes: int) -> dict[str, float]:
    """Run in a fresh process: one meta-step, after the level has been taken."""
    import torch

    from cml_dist.config.schema import ModelConfig
    from cml_dist.meta.model import MetaModel
    from cml_dist.meta.problem import Method
    from cml_dist.nets.build import build_net
    from cml_dist.types import Batch, Episode

    torch.set_num_threads(1)
    shape, ways, shots, queries = (3, 84, 84), 5, 5, 15
    net = build_net(ModelConfig(), input_shape=shape, output_dim=ways, seed=0, colearner=True)

    def score(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.argmax(1) == targets).float().mean()

    model = MetaModel(net, torch.nn.functional.cross_entropy, score, Method(inner_steps, 0.01, 0.01, 1.0), engine)

    def batch(count: int) -> Batch:
        return Batch(torch.randn(count * ways, *shape), torch.arange(ways).repeat_interleave(count))

    made = (Episode(batch(shots), batch(queries), "train", index) for index in range(episodes))
    level = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    loss, _ = model(made, 1 / episodes)
    loss.backward()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"level_gib": level / 2**20, "above_gib": (peak - level) / 2**20, "seconds": seconds}


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
        sys.exit()
    print("| engine | inner steps | episodes | peak above the built model, GiB | seconds |\n|---|---|---|---|---|")
    for case in CASES:
        out = subprocess.run([sys.executable, __file__, *map(str, case)], check=True, capture_output=True, text=True)
        got = json.loads(out.stdout.splitlines()[-1])
        print(f"| {case[0]} | {case[1]} | {case[2]} | {got['above_gib']:.2f} | {got['seconds']:.1f} |", flush=True)
    print(f"\nLevel of the built model: {got['level_gib']:.2f} GiB")
