"""``method.inner_lr=auto``: the rate of the inner loop by a few validation episodes, before training."""

from __future__ import annotations

import math

from cml_dist.config.methods import with_rate
from cml_dist.config.schema import AUTO, RunConfig
from cml_dist.distributed.world import World
from cml_dist.errors import TrainingError
from cml_dist.nets.build import method_of
from cml_dist.run.assemble import Parts
from cml_dist.run.evaluator import EvalReport, evaluate
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.text import interval, score, score_label

LADDER = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
EPISODES = 50
"""Most validation episodes, the same for each rate."""


def settled_rate(config: RunConfig, parts: Parts, world: World, console: Console) -> RunConfig:
    """The configuration with the rate of ``LADDER`` by which the initial parameters adapt best, where it is ``auto``.

    Of rates with the same score it is the lowest. ``parts.model`` has the method with that rate afterwards.

    Raises:
        TrainingError: no rate gives a finite score.

    Collective: all ranks, and all find the same.
    """
    if config.method.inner_lr != AUTO:
        return config
    count, name = min(EPISODES, config.eval.val_episodes), parts.domain.score_name
    params = {n: p.detach().to(world.device, parts.dtype) for n, p in parts.net.named_parameters()}
    reports: dict[float, EvalReport] = {}
    with console.progress("Choosing method.inner_lr", count * len(LADDER)) as view:
        for number, rate in enumerate(LADDER):
            parts.model.method = method_of(with_rate(config, rate), parts.net)
            reports[rate] = evaluate(
                config, parts, world, params, ("meta",), split="val", num_episodes=count,
                progress=lambda done, before=number * count: view.update(before + done),
            )["meta"]  # fmt: skip
    sign = 1 if parts.domain.higher_is_better else -1
    finite = [rate for rate in LADDER if math.isfinite(reports[rate].mean)]
    if not finite:
        remedy = "look for NaN and inf in the inputs and the initial weights"
        raise TrainingError(f"method.inner_lr is auto, but no rate of {LADDER} gives a finite score", remedy)
    chosen = max(finite, key=lambda rate: sign * reports[rate].mean)
    columns, rows = ("inner_lr", score_label(name), "95 % interval", ""), []
    for rate, report in reports.items():
        numbers = score(name, report.mean, 2), interval(name, report.ci95, 2)
        rows.append((f"{rate:g}", *numbers, "chosen" if rate == chosen else ""))
    console.table(f"method.inner_lr=auto: {count} val episodes, before training", columns, rows)
    if not (config.model.pretrained or config.model.init_from):
        console.note("The network starts from random values, which say little about a rate that suits it later")
    config = with_rate(config, chosen)
    parts.model.method = method_of(config, parts.net)
    return config
