"""Train on a made-up graph of any size, and say what it took.

    python benchmarks/large_graph.py [--nodes 170000 --edges 1200000 --features 128 --steps 50] [key=value ...]
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from cml_dist.cli import main as cml_dist
from cml_dist.telemetry.metrics import read_metrics


def write(path: Path, nodes: int, edges: int, features: int, classes: int = 40) -> None:
    """Edges between random nodes, of which few have many; features of noise and the class."""
    rng = np.random.default_rng(0)
    ends = (nodes * rng.random((2, edges)) ** 2).astype(np.int32)
    labels = rng.integers(0, classes, nodes)
    data = rng.standard_normal((nodes, features), dtype=np.float32) + rng.standard_normal((classes, features))[labels]
    np.savez(
        path, feat_data=data.astype(np.float32).ravel(), feat_indices=np.tile(np.arange(features), nodes),
        feat_indptr=np.arange(nodes + 1) * features, feat_shape=(nodes, features), edge_index=ends, labels=labels,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("nodes", 170_000), ("edges", 1_200_000), ("features", 128), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        graph, run = Path(folder, "graph.npz"), Path(folder, "run")
        write(graph, args.nodes, args.edges, args.features)
        begun = time.process_time()
        made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        settings = [f"domain.root={graph}", "domain.split=0", "domain.split_sizes=[20,10,10]", f"run.dir={run}"]
        settings += [f"train.steps={args.steps}", "eval.every=0", "eval.episodes=20", "eval.val_episodes=10"]
        cml_dist(["train", "citeseer", *settings, *overrides])
        seconds = sorted(line["seconds"] for line in read_metrics(run / "metrics.jsonl"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"seconds a meta-step: median {seconds[len(seconds) // 2]:.3f}, least {seconds[0]:.3f}")
        print(f"CPU seconds of the whole run: {time.process_time() - begun:.0f}")
        print(f"peak memory of the process: {peak / 2**20:.2f} GiB ({made / 2**20:.2f} once the graph was made up)")


if __name__ == "__main__":
    main()
