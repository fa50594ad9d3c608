"""How near the accuracy that leave-one-out tells from examples is to the truth, over tasks drawn from test classes.

    python benchmarks/leave_one_out.py RUN=PICTURES [RUN=PICTURES ...] --tasks 40

PICTURES is a folder of class folders that RUN was not trained on. A task: 5 classes, 5 and 10 examples of each; the
truth is the accuracy on 15 further pictures a class of the learner that adapted to all examples. Both are means over
the same tasks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import cml_dist
from cml_dist.run.interval import half_width
from cml_dist.run.leave_one_out import leave_one_out

WAYS, QUERIES = 5, 15


def measure(run: str, pictures: Path, examples: int, tasks: int) -> str:
    learner = cml_dist.load(run)
    classes = [sorted(folder.iterdir()) for folder in sorted(pictures.iterdir()) if folder.is_dir()]
    classes = [files for files in classes if len(files) >= examples + 5]
    found = []
    for task in range(tasks):
        draw = np.random.default_rng([examples, task])
        support, labels, query, truth = [], [], [], []
        for label, k in enumerate(draw.choice(len(classes), WAYS, replace=False)):
            files = [classes[k][i] for i in draw.permutation(len(classes[k]))[: examples + QUERIES]]
            support += files[:examples]
            labels += [label] * examples
            query += files[examples:]
            truth += [label] * (len(files) - examples)
        told = leave_one_out(learner, support, labels) / len(labels)
        answers = learner.adapt(support, labels).predict(query)
        found.append((told, np.mean([a == t for a, t in zip(answers, truth, strict=True)])))
    told, true = 100 * np.array(found).T
    cells = [f"{one.mean():.1f} ± {half_width(one.std(ddof=1), tasks):.1f}" for one in (told, true, told - true)]
    return f"| {run} | {examples} | {' | '.join(cells)} | {np.abs(told - true).mean():.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="RUN=PICTURES")
    parser.add_argument("--tasks", type=int, default=40)
    args = parser.parse_args()
    print("| run | examples a class | leave-one-out, % | truth, % | difference, points | mean size of it in one task |")
    print("|---|---|---|---|---|---|")
    for pair in args.pairs:
        run, _, pictures = pair.partition("=")
        for examples in (5, 10):
            print(measure(run, Path(pictures), examples, args.tasks), flush=True)


if __name__ == "__main__":
    main()
