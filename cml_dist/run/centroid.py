"""What a backbone's features are worth without meta-learning: the nearest class centroid, on the same episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cml_dist.config.methods import is_classifier, learner_title
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.world import World
from cml_dist.run.assemble import Parts
from cml_dist.run.evaluator import EvalReport, evaluate
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.text import interval, score
from cml_dist.types import Learner

TITLE = "nearest centroid"


def is_compared(config: RunConfig, parts: Parts) -> bool:
    """Whether the comparison means something: pictures in classes, and weights that were trained before."""
    from_weights = config.model.pretrained or config.model.init_from
    return bool(from_weights) and not is_classifier(config) and parts.domain.chance is not None


def score_centroid(
    config: RunConfig,
    parts: Parts,
    world: World,
    console: Console,
    split: str,
    num_episodes: int,
    stop: Callable[[], bool] = lambda: False,
) -> EvalReport:
    """Its scores on episodes of a split, with the weights that training begins with. Collective: all ranks."""
    params = {n: p.detach().to(world.device, parts.dtype) for n, p in parts.net.named_parameters()}
    with console.progress("Nearest centroid", num_episodes) as view:
        return evaluate(
            config, parts, world, params, ("meta",), split=split, num_episodes=num_episodes, by_centroid=True,
            progress=view.update, stop=stop,
        )["meta"]  # fmt: skip


def beside(report: EvalReport, centroid: EvalReport) -> dict[str, Any]:
    """The paired difference of a learner to it, with its 95 % interval over episodes."""
    found = EvalReport(report.scores - centroid.scores).summary()
    return {"difference": found["mean"], "ci95": found["ci95"]}


def in_words(config: RunConfig, against: Mapping[Learner, dict[str, Any]]) -> str:
    """The comparison of the learner that the run is about, as a sentence, which says so where it is below."""
    learner = config.eval.learner if config.eval.learner in against else "meta"
    found = against[learner]
    points, half = 100 * found["difference"], 100 * (found["ci95"] or 0.0)
    name, where = learner_title(config, learner), f"the {TITLE} on the features that training began with"
    said = f"{name} is {abs(points):.2f} ± {half:.2f} points {'above' if points >= 0 else 'below'} {where} (paired)"
    if points >= -half:
        return said
    remedy = (
        "lower method.inner_lr or optim.lr, train less of the body (model.trained), or set model.head=centroid "
        "model.feature_length=4"
    )
    return f"{said}: this run lost what the weights could do; {remedy}"


def tell_before(config: RunConfig, parts: Parts, world: World, console: Console, stop: Callable[[], bool]) -> None:
    """One line before training. Collective: all ranks."""
    report = score_centroid(config, parts, world, console, "val", config.eval.val_episodes, stop)
    name = parts.domain.score_name
    found = f"{score(name, report.mean, 2)} {interval(name, report.ci95, 2)}"
    console.note(f"The {TITLE} on the features as they are: {found} on the val episodes; meta-training has to beat it")
