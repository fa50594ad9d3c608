"""Draw the validation curves of runs beside each other, and print their test scores as a table.

    python benchmarks/curves.py --out curves.png "Omniglot 1-shot" runs/om1-cml runs/om1-maml ...

Arguments are panel titles (anything that is no run folder), each followed by its run folders; runs of one method in one
panel are seeds of it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import yaml  # noqa: E402

COLOURS = {"cml": "#0072b2", "maml": "#d55e00", "fomaml": "#009e73"}


def panels(arguments: list[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for argument in arguments:
        if (Path(argument) / "config.yaml").is_file():
            found[next(reversed(found))].append(Path(argument))
        else:
            found[argument] = []
    return found


def read(run: Path) -> tuple[str, int, list[dict], dict | None]:
    """(method, seed, validations, test report or None) of a run."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    validations = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    report = json.loads((run / "eval.json").read_text()) if (run / "eval.json").is_file() else None
    return config["method"]["name"], config["run"]["seed"], validations, report


def draw(found: dict[str, list[Path]], out: Path) -> None:
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.4), squeeze=False, layout="constrained")
    for axis, (title, runs) in zip(axes[0], found.items(), strict=True):
        for run in runs:
            method, seed, validations, _ = read(run)
            steps = [v["step"] for v in validations]
            mean = [100 * v["mean"] for v in validations]
            half = [100 * v["ci95"] for v in validations]
            low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
            axis.plot(steps, mean, color=COLOURS[method], label=f"{method.upper()}, seed {seed}", linewidth=1.5)
            axis.fill_between(steps, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="meta-steps")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="lower right")
    axes[0][0].set_ylabel("validation accuracy, % (band: 95 %)")
    figure.savefig(out, dpi=110)


def table(found: dict[str, list[Path]]) -> None:
    """Test scores: per run with the interval over episodes; per method the mean over seeds."""
    print("| task | method | seed | steps | learner | test accuracy, % | episodes |\n|---|---|---|---|---|---|---|")
    for title, runs in found.items():
        over_seeds: dict[tuple[str, str], list[float]] = defaultdict(list)
        for run in runs:
            method, seed, validations, report = read(run)
            for learner in ("meta", "co"):
                if report is None or learner not in report:
                    continue
                one, name = report[learner], "CML-dagger" if learner == "co" else method.upper()
                over_seeds[method, name].append(one["mean"])
                print(
                    f"| {title} | {method} | {seed} | {validations[-1]['step']} (best {report['step']}) | {name} "
                    f"| {100 * one['mean']:.2f} ± {100 * one['ci95']:.2f} | {one['episodes']} |"
                )
        for (method, name), means in over_seeds.items():
            if len(means) > 1:
                mean = sum(means) / len(means)
                spread = math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1))
                print(
                    f"| {title} | {method} | all | | {name} | {100 * mean:.2f} (sd over seeds {100 * spread:.2f}) "
                    f"| {len(means)} seeds |"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the picture to write (PNG)")
    parser.add_argument("arguments", nargs="+", metavar="TITLE|RUN_DIR")
    args = parser.parse_args()
    chosen = panels(args.arguments)
    draw(chosen, args.out)
    table(chosen)
