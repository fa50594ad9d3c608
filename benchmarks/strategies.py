"""Memory and traffic of each strategy: two processes on the CPU (gloo), fresh ones for each row.

    python benchmarks/strategies.py

ViT-S/16 (22 M parameters) at 64 px, CML with K = 3, adjoint in micro-batches of 5, 5-way 1-shot, 5 queries a class, two
episodes a rank, Adam, two meta-steps. ``above`` is the largest resident memory of rank 0 above its level once the
network is built; in units of the parameters' bytes (P) beside it. ``predicted`` is what ``cml-dist plan`` says of the
same, on the CPU with what is offloaded, since that lies in the same memory here. The last column is the largest
difference of a parameter to the first row's after the two steps.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    ("ddp", "none"),
    ("zero0", "none"),
    ("zero1", "none"),
    ("zero2", "none"),
    ("zero2", "optimizer"),
    ("zero3", "none"),
    ("zero3", "optimizer"),
    ("zero3", "all"),
]
WAYS, SHAPE, STEPS, BATCH = 5, (3, 64, 64), 2, 4


def worker(strategy_name: str, offload: str, out: str) -> None:
    """One rank: two meta-steps under a strategy."""
    import torch

    from cml_dist.config.load import parse_config
    from cml_dist.config.plan import make_plan
    from cml_dist.distributed.exit import leave
    from cml_dist.distributed.world import join_world, set_arithmetic
    from cml_dist.distributed.zero import build_strategy
    from cml_dist.memory.choose import MemoryPlanner
    from cml_dist.memory.strategies import Strategy
    from cml_dist.meta.model import MetaModel
    from cml_dist.meta.rule import Method
    from cml_dist.nets.build import build_net
    from cml_dist.run.stream import rank_share
    from cml_dist.types import Batch, Episode

    config = parse_config(
        {
            "domain": {"name": "images", "root": "unused", "ways": WAYS, "shots": 1, "queries": 5},
            "model": {"backbone": "vit_small_patch16_224", "colearner": {"depth": 1}},
            "method": {"inner_steps": 3},
            "engine": {"name": "adjoint", "micro_batch": 5},
            "memory": {"budget_gib": 100},  # freed memory is given back: what is measured is the tensors
            "train": {"episodes_per_step": BATCH},
            "parallel": {"strategy": strategy_name, "offload": offload, "threads": 1},
            "run": {"device": "cpu"},
        }
    )
    world = join_world(config)
    set_arithmetic(config, world)
    plan = make_plan(config, world.size, os.environ)
    net = build_net(config.model, input_shape=SHAPE, output_dim=WAYS, seed=0, colearner=True)
    loss = torch.nn.functional.cross_entropy

    def score(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.argmax(1) == targets).float().mean()

    def episode(index: int) -> Episode:
        generator = torch.Generator().manual_seed(index)

        def batch(each: int) -> Batch:
            labels = torch.arange(WAYS).repeat_interleave(each)
            return Batch(torch.randn(each * WAYS, *SHAPE, generator=generator), labels)

        return Episode(batch(1), batch(5), "train", index)

    method = Method.sgd(3, 0.01, 0.01, 1.0)
    domain = SimpleNamespace(input_shape=SHAPE, output_dim=WAYS, loss=loss, score=score)
    planner = MemoryPlanner(config, plan, net, method, domain, on_gpu=False)
    predicted = planner.bytes_needed(Strategy(strategy_name, offload), plan, world.size)
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    level = _resident_kib() - size // 1024  # the network's own values count as the strategy's parameters
    model = MetaModel(net, loss, score, method, "adjoint", micro_batch=5)
    del net
    strategy = build_strategy(config, plan, world, model)
    seconds = time.perf_counter()
    for step in range(STEPS):
        made = (episode(index) for index in rank_share(step, BATCH, world.rank, world.size))
        strategy.gradient(made, BATCH)
        strategy.apply(config.optim.lr, None)
    seconds = time.perf_counter() - seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    params = strategy.params()
    if world.is_main:
        torch.save(params, Path(out) / "params.pt")
        numbers = {"above": (peak - level) * 1024, "size": size, "predicted": predicted, "seconds": seconds}
        (Path(out) / "numbers.json").write_text(json.dumps(numbers))
    world.close()
    leave(0)


def _resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def main() -> None:
    import torch

    print("| strategy | offload | above, GiB | in P | predicted, GiB | s | difference |\n|---|---|---|---|---|---|---|")
    reference = None
    for row in ROWS:
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
            command += ["--config_file", str(ROOT / "launch/accelerate/cpu.yaml"), "--num_processes", "2"]
            done = subprocess.run([*command, __file__, *row, out], capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                print(f"| {row[0]} | {row[1]} | failed | | | | |\n{done.stderr[-2000:]}", flush=True)
                continue
            got = json.loads((Path(out) / "numbers.json").read_text())
            params = torch.load(Path(out) / "params.pt")
        reference = reference or params
        difference = max((params[n] - reference[n]).abs().max().item() for n in params)
        print(
            f"| {row[0]} | {row[1]} | {got['above'] / 2**30:.2f} | {got['above'] / got['size']:.1f} "
            f"| {got['predicted'] / 2**30:.2f} | {got['seconds']:.0f} | {difference:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    worker(*sys.argv[1:]) if len(sys.argv) == 4 else main()
