"""Node classification: a base with and without the co-learner, over class splits and seeds, as one table.

    python benchmarks/nodes.py --data FOLDER --runs runs/nodes --part 0/2     # and 1/2 beside it; goes on where it was
    python benchmarks/nodes.py --data FOLDER --runs runs/nodes --table

Each run is trained and tested in this process by the shipped recipe with the settings below. Rows: the mean over runs
with its 95 % interval (Student's t over splits and seeds), the mean interval over the test episodes of a run, and the
spread (standard deviation) of the splits' means. The difference to MAML is paired: the same split, seed and episodes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import time
from pathlib import Path

import torch

from cml_dist.config.load import load_config
from cml_dist.run.interval import half_width
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

COMMON = (
    "train.steps=200", "eval.every=40", "eval.val_episodes=20", "eval.episodes=100", "eval.untrained=false",
    "checkpoint.every=200", "run.log_every=200", "parallel.threads=1",
)  # fmt: skip
SIZES = {"citeseer": (2, 2, 2), "amazon_computers": (4, 3, 3), "coauthor_cs": (5, 5, 5)}
G_META = ("domain.base=g_meta",)
STUDIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "gcn on citeseer": ("citeseer", ()),
    "gcn on citeseer, order 1": ("citeseer", ("method.order=1",)),
    "g_meta on citeseer": ("citeseer", G_META),
    "gcn on amazon_computers": ("amazon_computers", ()),
    "gcn on coauthor_cs": ("coauthor_cs", ()),
}
METHODS, SEEDS, SPLITS = ("maml", "cml"), (0, 1), range(5)


def cases(shots: int) -> list[tuple[str, str, int, int, int]]:
    """(study, method, shots, split, seed), so that what is compared comes side by side."""
    return [(*c[:1], c[3], shots, *c[1:3]) for c in itertools.product(STUDIES, SPLITS, SEEDS, METHODS)]


def folder_of(runs: Path, study: str, method: str, shots: int, split: int, seed: int) -> Path:
    return runs / f"{study.replace(' ', '_').replace(',', '')}-{shots}shot" / f"{method}-split{split}-seed{seed}"


def run(data: Path, runs: Path, case: tuple[str, str, int, int, int]) -> None:
    study, method, shots, split, seed = case
    folder = folder_of(runs, *case)
    if (folder / "eval.json").exists():
        return
    name, own = STUDIES[study]
    words = [
        *COMMON, *own, f"domain.root={data / f'{name}.npz'}", f"domain.split={split}", f"run.seed={seed}",
        f"domain.split_sizes=[{','.join(map(str, SIZES[name]))}]", f"domain.shots={shots}", f"method.name={method}",
        f"run.dir={folder}",
    ]  # fmt: skip
    began_s, said = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(said):
        train(load_config("citeseer", words), Console(quiet=True))
    found = json.loads((folder / "eval.json").read_text())
    print(f"{study}, {shots}-shot, {method}, split {split}, seed {seed}: {found['meta']['mean']:.4f}, "
          f"{time.monotonic() - began_s:.0f} s", flush=True)  # fmt: skip


def table(runs: Path, shots: int) -> None:
    def read(study: str, method: str) -> dict[tuple[int, int], dict]:
        found = {}
        for split, seed in itertools.product(SPLITS, SEEDS):
            file = folder_of(runs, study, method, shots, split, seed) / "eval.json"
            if file.exists():
                found[split, seed] = json.loads(file.read_text())
        return found

    def row(title: str, means: dict[tuple[int, int], float], widths: list[float]) -> None:
        values = [100 * m for m in means.values()]
        splits = sorted({split for split, _ in means})
        each = [statistics.mean(100 * m for (s, _), m in means.items() if s == split) for split in splits]
        spread = f"{statistics.stdev(each):.2f}" if len(each) > 1 else "-"
        ci = f"{half_width(statistics.stdev(values), len(values)):.2f}" if len(values) > 1 else "-"
        width = f"{100 * statistics.mean(widths):.2f}" if widths else "-"
        print(f"| {title} | {len(values)} | {statistics.mean(values):.2f} ± {ci} | {width} | {spread} |")

    print(f"\n{shots}-shot\n\n| what | runs | mean ± over runs | ± over episodes | spread over splits |")
    print("|---|---|---|---|---|")
    for study in STUDIES:
        found = {method: read(study, method) for method in METHODS}
        learners = (("maml", "meta", "MAML"), ("cml", "meta", "CML"), ("cml", "co", "CML-dagger"))
        for method, learner, title in learners:
            own = {case: result[learner] for case, result in found[method].items()}
            if own:
                row(f"{study}: {title}", {c: r["mean"] for c, r in own.items()}, [r["ci95"] for r in own.values()])
        both = found["maml"].keys() & found["cml"].keys()
        if both:
            gains = {c: found["cml"][c]["meta"]["mean"] - found["maml"][c]["meta"]["mean"] for c in sorted(both)}
            row(f"{study}: CML - MAML, paired", gains, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of citeseer.npz and the others")
    parser.add_argument("--runs", type=Path, default=Path("runs/nodes"))
    parser.add_argument("--shots", type=int, nargs="*", default=[1, 5])
    parser.add_argument("--part", default="0/1", help="i/n: every n-th case from the i-th on")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    first, step = map(int, asked.part.split("/"))
    for shots in asked.shots:
        if asked.table:
            table(asked.runs, shots)
            continue
        for case in cases(shots)[first::step]:
            run(asked.data, asked.runs, case)


if __name__ == "__main__":
    main()
