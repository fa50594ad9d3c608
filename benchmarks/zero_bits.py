"""Where ZeRO's stages end against DDP, in float32, step by step: 2 processes on the CPU, small networks.

    python benchmarks/zero_bits.py

One line a stage and case: the largest difference of a parameter after each of three meta-steps of four episodes.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "dist"))

import torch  # noqa: E402
from launching import run_ranks  # noqa: E402
from parity_worker import Case, config_of, join, prepare  # noqa: E402

from cml_dist.distributed.exit import leave  # noqa: E402
from cml_dist.run.stream import episode_stream, rank_share  # noqa: E402

STAGES, STEPS, EPISODES = ("zero3", "zero2", "zero1", "zero0"), 3, 4
# Of SGD also at rate 1, where a difference of a gradient in its last bit shows in the parameters.
CASES = list(itertools.product(("vit", "conv4"), (("sgd", 1.0), ("sgd", 1e-3), ("adamw", 1e-2)), (None, 0.5)))


def train(world, strategy_name, net, optimizer, lr, clip_norm):
    """Parameters after each step."""
    case = Case(strategy_name, "float32", net, "graph", (EPISODES,) * STEPS, optimizer)
    (_, domain, strategy), after = prepare(world, case), []
    for step in range(STEPS):
        indices = rank_share(step, EPISODES, world.rank, world.size)
        strategy.gradient(episode_stream(domain, "train", indices, device=world.device, dtype=torch.float32), EPISODES)
        strategy.apply(lr, clip_norm)
        after.append({name: value.to("cpu", copy=True) for name, value in strategy.params().items()})
    return after


def rank() -> None:
    torch.set_num_threads(1)
    found = {}
    for name in (*STAGES, "ddp"):
        world = join(config_of(name, "float32", "sgd", "cpu"))
        for net, (optimizer, lr), clip in CASES:
            found[name, net, optimizer, lr, clip] = train(world, name, net, optimizer, lr, clip)
    for (name, *case), after in found.items():
        pairs = zip(after, found[("ddp", *case)], strict=True)
        worst = [max((one[key] - ddp[key]).abs().max().item() for key in ddp) for one, ddp in pairs]
        if world.is_main and name != "ddp":
            print(name, *case, "  ", ", ".join(f"{value:.1e}" if value else "0" for value in worst), flush=True)
    world.close()
    leave(0)


if __name__ == "__main__":
    if "rank" in sys.argv:
        rank()
    else:
        code, out = run_ranks(2, __file__, "rank")
        sys.exit(print(out) or code)
