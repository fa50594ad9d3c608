"""Every method and head with and without the co-learner, on Glyphs: accuracy, paired differences, cost, memory.

    python benchmarks/methods.py run --dir runs/methods --at-once 2     # trains what is missing, then prints the table
    python benchmarks/methods.py table --dir runs/methods
    python benchmarks/methods.py cost                        # seconds and bytes of a meta-step, in one process
    python benchmarks/methods.py run --only "K = 2" MAML++   # variants whose names contain one of these words
    python benchmarks/methods.py cost --table benchmarks/tables/neighbours.yaml    # of a table's rows

5-way 1-shot, Conv-4 with 32 filters, 5 queries a class in training and test, 4 episodes a meta-step, each method with
its own published defaults (K <= 2; MAML++ and Sharp-MAML, which have 5 steps in their papers, with 2). All variants are
tested on the same 500 episodes, so that a difference is paired: its mean with the 95 % interval over episodes, of each
seed. A run that was stopped goes on; one that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SEEDS = (0, 1)
SETTINGS = (
    "model.filters=32 domain.queries=5 train.steps=300 train.episodes_per_step=4 eval.every=100 eval.val_episodes=100 "
    "eval.episodes=500 eval.untrained=false checkpoint.every=100 run.log_every=50 parallel.threads=1 run.device=cpu"
).split()
CO = ("method.colearner=true",)
BASES = {
    "MAML": ("method.name=maml",),
    "FOMAML": ("method.name=fomaml",),
    "ANIL": ("method.name=anil",),
    "BOIL": ("method.name=boil",),
    "Meta-SGD": ("method.name=meta_sgd",),
    "MAML, shared head": ("method.name=maml", "model.head=shared"),
    "MAML, ridge head": ("method.name=maml", "model.head=ridge"),
    "ProtoNet": ("method.name=maml", "model.head=centroid", "method.inner_steps=0"),
    "R2-D2": ("method.name=maml", "model.head=ridge", "method.inner_steps=0"),
    # Multi-step losses in the first half, in 15 epochs as in the paper.
    "MAML++": tuple(
        f"method.{word}" for word in "name=maml_pp inner_steps=2 multi_step_loss=150 multi_step_every=10".split()
    ),
    "Sharp-MAML": ("method.name=sharp_maml", "method.inner_steps=2", "method.inner_lr=0.5"),
}
CONTROLS = {
    "MAML, untrained co-learner": ("method.name=maml", "method.colearner=untrained"),
    "MAML, two adapting heads": ("method.name=maml", "method.colearner=adapts"),
    "MAML, K = 2": ("method.name=maml", "method.inner_steps=2"),
    "MAML, K = 2, with": ("method.name=maml", "method.inner_steps=2", *CO),
    "MAML, three more blocks": ("method.name=maml", "model.extra_blocks=3"),
}
AGAINST = {"MAML++": "MAML, K = 2", "Sharp-MAML": "MAML, K = 2", "MAML, K = 2, with": "MAML, K = 2"}
"""With what a variant is compared that is neither a control of MAML nor a method with its co-learner."""
VARIANTS = {
    **{name: words for base, words in BASES.items() for name, words in ((base, words), (f"{base}, with", words + CO))},
    **CONTROLS,
}
MORE_COSTS = {
    "Sharp-MAML, detached ascent": (*BASES["Sharp-MAML"], "method.ascent=detached"),
    "Sharp-MAML, lower": (*BASES["Sharp-MAML"], "method.sharp=lower"),
    "Sharp-MAML, upper": (*BASES["Sharp-MAML"], "method.sharp=upper"),
    "MAML, K = 2, norms adapt": ("method.name=maml", "method.inner_steps=2", "method.adapts=[head,norms]"),
}
"""Variants whose cost alone is measured."""


def folder(root: Path, name: str, seed: int) -> Path:
    return root / f"{''.join(c if c.isalnum() else '_' for c in name)}-{seed}"


def train(root: Path, name: str, seed: int) -> None:
    """One run, by the command line; says how it ended."""
    place = folder(root, name, seed)
    if (place / "eval.json").is_file():
        return
    words = [*SETTINGS, *VARIANTS[name], f"run.seed={seed}", f"run.dir={place}"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "cml_dist", "train", "glyphs", *words], capture_output=True, text=True
    )
    how = "ended" if done.returncode == 0 else f"failed ({done.returncode}): {done.stderr[-500:]}"
    print(f"{name}, seed {seed}: {how} after {time.monotonic() - began:.0f} s", flush=True)


def scores(root: Path, name: str, seed: int) -> np.ndarray | None:
    path = folder(root, name, seed) / "eval_scores.npz"
    return np.load(path)["meta"] if path.is_file() else None


def interval(values: np.ndarray) -> str:
    return f"{100 * values.mean():+.2f} ± {196 * values.std(ddof=1) / math.sqrt(len(values)):.2f}"


def table(root: Path, names: list[str]) -> None:
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    rows = " | ".join(f"difference, seed {seed}" for seed in SEEDS)
    print(f"| variant | {seeds} | against | {rows} |\n|---|" + "---|" * (2 * len(SEEDS) + 1))
    for name in names:
        base = AGAINST.get(name) or ("MAML" if name in CONTROLS else name.removesuffix(", with"))
        own, theirs = ([scores(root, which, seed) for seed in SEEDS] for which in (name, base))
        shown = [interval(s).removeprefix("+") if s is not None else "-" for s in own]
        pairs = zip(own, theirs, strict=True)
        gains = ["" if base == name else "-" if a is None or b is None else interval(a - b) for a, b in pairs]
        print(f"| {name} | {' | '.join(shown)} | {'' if base == name else base} | {' | '.join(gains)} |")


def cost(repeats: int, recipe: str, variants: Mapping[str, Sequence[str]]) -> None:
    """Seconds of a meta-step of each variant, in turn, and the bytes of its live tensors at their peak."""
    import torch

    from cml_dist.config.load import load_config
    from cml_dist.data.build import build_domain
    from cml_dist.distributed.allocator import keep_freed_memory
    from cml_dist.memory.live_bytes import LiveBytes
    from cml_dist.meta.model import MetaModel
    from cml_dist.nets.build import make_network, method_of

    torch.set_num_threads(1)
    keep_freed_memory()
    steps = {}
    for name, words in variants.items():
        config = load_config(recipe, list(words))
        domain = build_domain(config.domain, train_seed=0, eval_seed=0)
        net = make_network(config, domain.input_shape, domain.output_dim)
        model = MetaModel(net, domain.loss, domain.score, method_of(config, net), "graph")
        drawn = (domain.episode("train", index) for index in range(config.train.episodes_per_step))
        steps[name] = model, [domain.prepare(episode, torch.device("cpu"), torch.float32) for episode in drawn]
    seconds: dict[str, list[float]] = {name: [] for name in steps}

    def step(name: str) -> None:
        model, episodes = steps[name]
        model(episodes, 1 / len(episodes))[0].backward()
        model.zero_grad(set_to_none=True)

    for _ in range(repeats + 1):
        for name in steps:
            began = time.perf_counter()
            step(name)
            seconds[name].append(time.perf_counter() - began)
    base = next(iter(steps))
    print(f"| variant | s a meta-step (median) | in that of {base} | peak of live tensors, MiB |\n|---|---|---|---|")
    for name, (model, _) in steps.items():
        with LiveBytes() as live:
            live.standing([*model.parameters(), *model.buffers()])
            step(name)
        ratio = float(np.median(np.array(seconds[name][1:]) / np.array(seconds[base][1:])))
        print(f"| {name} | {np.median(seconds[name][1:]):.3f} | {ratio:.2f} | {live.peak / 2**20:.1f} |")


def rows_of(table: str) -> tuple[str, dict[str, list[str]]]:
    """The recipe of a table of `cml-dist repro`, and the settings of each of its rows."""
    from cml_dist.config.repro import find_table, settings_of

    rows = find_table(table).rows
    settings = {name: settings_of(row, "data") for name, row in rows.items()}
    named = {name: [f"{key}={json.dumps(value)}" for key, value in own.items()] for name, own in settings.items()}
    return next(iter(rows.values())).recipe, named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "cost"])
    parser.add_argument("--dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose names contain one of these words")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--table", help="cost: a table of `cml-dist repro`, whose rows are measured")
    args = parser.parse_args()
    known = [*VARIANTS, *(MORE_COSTS if args.what == "cost" else ())]
    names = [name for name in known if any(word in name for word in args.only)]
    if args.what == "cost":
        variants = {name: [*SETTINGS, *{**VARIANTS, **MORE_COSTS}[name]] for name in dict.fromkeys(["MAML", *names])}
        cost(args.repeats, *(rows_of(args.table) if args.table else ("glyphs", variants)))
        return
    if args.what == "run":
        jobs = [(name, seed) for seed in SEEDS for name in names]
        with ThreadPoolExecutor(args.at_once) as pool:
            list(pool.map(lambda job: train(args.dir, *job), jobs))
    table(args.dir, names)


if __name__ == "__main__":
    main()
