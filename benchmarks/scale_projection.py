"""How wrong is a projection from 1 and 2 ranks about 4, 8 and 16?

    python benchmarks/scale_projection.py                                   # as root; about 25 minutes on 2 cores
    python benchmarks/scale_projection.py --ranks 4 --repeats 2 --steps 4 --megabit 1000     # a few minutes

Ranks are machines of ``weak_scaling.py``: network namespaces behind a wire of a known bandwidth and delay, whose
computing is a wait; the rest is the trainer's own. Latency and bandwidth are fitted to the worlds of 1 and 2 alone, of
two networks whose meta-gradients differ in size, as ``cml-dist scale`` does it (``experiments/scale_fit.py``); standard
errors are those of the repeats, each in fresh processes. Then the larger worlds are measured, and compared.
"""

from __future__ import annotations

import argparse
import math
import statistics

import weak_scaling
from weak_scaling import CASES, DELAY_S, EPISODES, machines, row, run

from cml_dist.experiments.scale_fit import Point, fit

COMPUTE_S = {"conv4": 0.15, "resnet12": 1.5}
"""Of a rank's meta-step; about what 4 episodes take on one core (2026-11-29)."""


def mean(values: list[float]) -> tuple[float, float]:
    """With its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def cell(case: str, size: int, gbit: float, asked: argparse.Namespace) -> Point:
    """Seconds in the wire's own measure: it is slower than ``gbit``, and what waits for it counts by as much less."""
    slower = 1000 * gbit / asked.megabit
    local, reduction = [], []
    for _ in range(asked.repeats):
        wait_s = COMPUTE_S[case] / EPISODES
        if size == 1:
            found = run(case, 1, wait_s)
        else:
            with machines(size, 1e9 * gbit / slower, DELAY_S * slower) as names:
                found = run(case, size, wait_s, names)
        local.append(COMPUTE_S[case] + found["metrics"] / slower)  # what else the cores do has no part in it
        reduction.append(found["reduction"] / slower)
    return Point(case, size, EPISODES, mean(local), mean(reduction) if size > 1 else (0.0, 0.0), int(found["bytes"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument("--gbit", type=float, nargs="*", default=[1, 10])
    parser.add_argument("--megabit", type=float, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=weak_scaling.STEPS)
    asked = parser.parse_args()
    weak_scaling.STEPS = asked.steps
    import cml_dist.run.trainer  # noqa: F401

    for gbit in asked.gbit:
        known = [cell(case, size, gbit, asked) for case in CASES for size in (1, 2)]
        model = fit(known)
        latency, each = (model.reduction.of(name) for name in ("latency", "a byte"))
        print(
            f"\nA wire of {gbit:g} Gbit/s and {1e6 * DELAY_S:g} us, fitted on 1 and 2 ranks: "
            f"{8e-9 / each[0]:.3g} Gbit/s, {1e6 * latency[0]:.0f} +- {1e6 * latency[1]:.0f} us a round\n"
        )
        row("", "ranks", "seconds", "projected", "error", "reduction", "projected", "error")
        row(*["---"] * 8)
        for point in known[::2]:
            for size in asked.ranks:
                found = cell(point.variant, size, gbit, asked)
                seconds, error = model.predict(point, size, EPISODES)
                local = model.local[point.variant].at([1, EPISODES])[0]
                now = found.local[0] + found.reduction[0]
                row(
                    point.variant, size, f"{now:.4f} +- {math.hypot(found.local[1], found.reduction[1]):.4f}",
                    f"{seconds:.4f} +- {error:.4f}", f"{seconds / now - 1:+.1%}",
                    f"{found.reduction[0]:.4f} +- {found.reduction[1]:.4f}", f"{seconds - local:.4f}",
                    f"{(seconds - local) / found.reduction[0] - 1:+.1%}",
                )  # fmt: skip


if __name__ == "__main__":
    main()
