"""What a meta-step of each row of a table of `cml-dist repro` costs: seconds, in turn in one process, and live bytes.

    python benchmarks/cost.py benchmarks/tables/neighbours.yaml
    python benchmarks/cost.py benchmarks/tables/methods.yaml --rows '*pp*' --repeats 7

The first row, and with `--rows` a baseline of what matches, is what the others are divided by, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from cml_dist.config.load import load_config
from cml_dist.config.repro import Row, chosen, find_table, settings_of
from cml_dist.data.build import build_domain
from cml_dist.distributed.allocator import keep_freed_memory
from cml_dist.memory.live_bytes import LiveBytes
from cml_dist.meta.model import MetaModel
from cml_dist.nets.build import make_network, method_of
from cml_dist.types import Episode


def made(row: Row, data: str) -> tuple[MetaModel, list[Episode]]:
    """The meta-model of a row, and the episodes of its first meta-step."""
    settings = settings_of(row, data)
    config = load_config(row.recipe, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    domain = build_domain(config.domain, train_seed=0, eval_seed=0)
    net = make_network(config, domain.input_shape, domain.output_dim)
    drawn = (domain.episode("train", index) for index in range(config.train.episodes_per_step))
    episodes = [domain.prepare(episode, torch.device("cpu"), torch.float32) for episode in drawn]
    return MetaModel(net, domain.loss, domain.score, method_of(config, net), "graph"), episodes


def step(model: MetaModel, episodes: list[Episode]) -> None:
    model(episodes, 1 / len(episodes))[0].backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table")
    parser.add_argument("--rows", help="those whose name matches, or has it in it, with their baselines")
    parser.add_argument("--data", default="data", help="the folder of packed image sets")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = {name: made(row, args.data) for name, row in chosen(find_table(args.table), args.rows).items()}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(args.repeats + 1):  # the first is a warm-up
        for name, parts in rows.items():
            began = time.perf_counter()
            step(*parts)
            seconds[name].append(time.perf_counter() - began)
    base = next(iter(rows))
    print(f"| row | s a meta-step (median) | in that of {base} | peak of live tensors, MiB |\n|---|---|---|---|")
    for name, (model, episodes) in rows.items():
        with LiveBytes() as live:
            live.standing([*model.parameters(), *model.buffers()])
            step(model, episodes)
        ratio = float(np.median(np.array(seconds[name][1:]) / np.array(seconds[base][1:])))
        print(f"| {name} | {np.median(seconds[name][1:]):.3f} | {ratio:.2f} | {live.peak / 2**20:.1f} |")


if __name__ == "__main__":
    main()
