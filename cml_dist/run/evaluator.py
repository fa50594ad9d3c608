"""Scores of a learner over fixed episodes, with an interval: CML (eq. 8) and CML-dagger (eq. 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cml_dist.config.methods import is_classifier
from cml_dist.config.schema import RunConfig
from cml_dist.data.base import episode_rng
from cml_dist.distributed.world import World
from cml_dist.meta.inner import adapt
from cml_dist.meta.problem import Problem, class_means
from cml_dist.meta.rule import Method
from cml_dist.run.assemble import Parts
from cml_dist.run.interrupts import Stopped
from cml_dist.run.interval import half_width
from cml_dist.run.stream import episode_stream
from cml_dist.telemetry.console import ResultRow
from cml_dist.types import Batch, Episode, Learner, Params

ORDERS_SEED = 2**32
"""Of label orders: no seed of episodes is so large, so that orders and classes are drawn apart."""


@dataclass(frozen=True)
class EvalReport:
    """Scores of one learner.

    Attributes:
        scores: ``[episodes]`` float64, in order of episode index; with several label orders their mean.
        order_sd: ``[episodes]``, the standard deviation over label orders; None with one order.
        mean: of the scores.
        ci95: half width of the 95 % interval of the mean over episodes, by Student's t.
        grid: scores on the curve without noise on a fixed grid, where the domain has one (:meth:`Domain.grid`).
    """

    scores: Tensor
    order_sd: Tensor | None = None
    grid: EvalReport | None = None

    @property
    def mean(self) -> float:
        return self.scores.mean().item()

    @property
    def ci95(self) -> float:
        return half_width(self.scores.std(correction=1).item(), n) if (n := len(self.scores)) > 1 else math.nan

    def summary(self) -> dict[str, Any]:
        """For JSON: what is not finite (a diverged learner, the interval of one episode) is null."""
        numbers = {"mean": self.mean, "ci95": self.ci95}
        if self.order_sd is not None:
            numbers["label_order_sd"] = self.order_sd.mean().item()
        found = {k: v if math.isfinite(v) else None for k, v in numbers.items()} | {"episodes": len(self.scores)}
        return found if self.grid is None else {**found, "grid": self.grid.summary()}

    def row(self, name: str) -> ResultRow:
        """For a table, under the learner's name."""
        return ResultRow(name, self.mean, self.ci95, len(self.scores))


def answers_of(
    params: Params,
    episode: Episode,
    problem: Problem,
    method: Method,
    learners: Sequence[Learner],
    asked: Sequence[Batch],
    co_adapt: str = "eq9",
    norm: str = "batch",
) -> dict[Learner, list[Tensor]]:
    """Adapt on the support set; each learner's outputs on each batch of ``asked``. No second-order graph is built.

    Learners that adapt alike share one adaptation, and one pass on each batch.

    Args:
        norm: see :meth:`Problem.answers`.
        learners: ``meta`` adapts psi and theta, and answers by f_m (eq. 8); ``co`` by f_c = (psi', phi).
        co_adapt: for ``co``: ``eq9`` adapts psi by the co-learner's own support loss with phi frozen; ``released``
            adapts psi and theta by the meta-learner's loss, as the authors' test script does.
    """
    groups: dict[Learner, list[Learner]] = {}  # by whose loss it adapts
    for learner in learners:
        groups.setdefault(learner if co_adapt == "eq9" else "meta", []).append(learner)
    found: dict[Learner, list[Tensor]] = {learner: [] for learner in learners}
    for by, group in groups.items():
        adapted = adapt(params, episode, problem, method, by)
        for batch in asked:
            outputs = problem.answers(adapted, replace(episode, query=batch), group, norm)
            for learner, output in zip(group, outputs, strict=True):
                found[learner].append(output)
    return found


def score_episode(
    params: Params,
    episode: Episode,
    problem: Problem,
    method: Method,
    learners: Sequence[Learner],
    co_adapt: str = "eq9",
    norm: str = "batch",
    others: Sequence[Params] = (),
    grid: Batch | None = None,
) -> Tensor:
    """Adapt on the support set, score on the query set, then on ``grid``: ``[learners, 1 or 2]``.

    Args:
        learners, co_adapt, norm: see :func:`answers_of`.
        others: of an ensemble: each adapts by itself, and the mean of the outputs is scored.
    """
    asked = [episode.query] if grid is None else [episode.query, grid]
    members = [answers_of(p, episode, problem, method, learners, asked, co_adapt, norm) for p in (params, *others)]

    def scores(learner: Learner) -> Tensor:
        pairs = zip(zip(*(member[learner] for member in members), strict=True), asked, strict=True)
        return torch.stack([problem.score(torch.stack(of_all).mean(0), batch.targets) for of_all, batch in pairs])

    return torch.stack([scores(learner) for learner in learners])


def centroid_score(params: Params, episode: Episode, problem: Problem, norm: str) -> Tensor:
    """Score on the query set of the class whose mean support feature is nearest, features on the unit sphere.

    Args:
        norm: ``batch`` or ``support``, as of :meth:`Problem.answers`.

    Source: SimpleShot (Wang et al., 1911.04623), "L2N".
    """
    support = normalize(problem.values(params, episode.support, ("pooled",))[0])
    query = normalize(problem.answers(params, episode, ("pooled",), norm)[0])
    means = class_means(support, episode.support.targets, episode.ways)
    return problem.score(problem.against_prototypes(query, means), episode.query.targets)


def evaluate(
    config: RunConfig,
    parts: Parts,
    world: World,
    params: Params,
    learners: Sequence[Learner],
    *,
    split: str,
    num_episodes: int,
    permutations: int = 1,
    others: Sequence[Params] = (),
    on_grid: bool = False,
    by_centroid: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, EvalReport]:
    """Score each learner on episodes 0 .. num_episodes - 1 of a split, shared out over the ranks.

    Each episode is scored alone, so the report is the same for any world size, to the bit where each process has as
    many threads (parallel.threads). Collective: all ranks.

    Args:
        params: on the device where ``parts.model`` is.
        permutations: label orders (:func:`label_orders`) under which each episode is tested.
        others: of an ensemble, see :func:`score_episode`.
        on_grid: also score each curve on its grid, where the domain has one.
        by_centroid: by :func:`centroid_score`, as a plain classifier always is, and not by :func:`score_episode`.
        stop: asked before each episode: whether to break off, and raise Stopped on all ranks.
    """
    by_centroid = by_centroid or is_classifier(config)
    problem, norm = parts.model.problem, config.eval.norm
    how = (config.eval.co_adapt, norm, others)
    method = replace(parts.model.method, inner_steps=parts.plan.test_inner_steps)
    # Mean and spread over label orders of each learner, and its mean on the grid (without one the first mean again);
    # and a row that is not 0 where a rank broke off.
    table = torch.zeros(3 * len(learners) + 1, num_episodes, dtype=torch.float64)
    mine, workers = range(world.rank, num_episodes, world.size), config.domain.workers
    stream = episode_stream(parts.domain, split, mine, device=world.device, dtype=parts.dtype, workers=workers)
    on_grid = on_grid and parts.domain.grid(split, 0) is not None
    world.heartbeat.beat(f"{split}, episode 1 of {len(mine)}")
    for count, episode in enumerate(stream, start=1):
        if stop():
            table[-1] = 1.0
            break
        orders = label_orders(episode, permutations)
        where = (split, episode.index, world.device, parts.dtype)
        grid = parts.domain.prepared_grid(*where) if on_grid else None
        rows = (
            centroid_score(params, order, problem, norm).view(1, 1) if by_centroid
            else score_episode(params, order, problem, method, learners, *how, grid) for order in orders
        )  # fmt: skip
        scores = [row.double().cpu() for row in rows]
        mean = sum(scores) / len(scores)
        table[0:-1:3, episode.index], table[2:-1:3, episode.index] = mean[:, 0], mean[:, -1]
        if permutations > 1:
            table[1:-1:3, episode.index] = torch.stack(scores)[:, :, 0].std(0, correction=1)
        progress(min(count * world.size, num_episodes))
        world.heartbeat.beat(f"{split}, episode {count + 1} of {len(mine)}")
    *table, broken_off = world.sum(table.flatten()).reshape_as(table)
    if broken_off.any():
        raise Stopped
    found = zip(learners, table[::3], table[1::3], table[2::3], strict=True)
    orders, grid = permutations > 1, EvalReport if on_grid else lambda scores: None
    return {who: EvalReport(mean, spread if orders else None, grid(on_it)) for who, mean, spread, on_it in found}


def label_orders(episode: Episode, count: int) -> list[Episode]:
    """The episode under its own and ``count - 1`` other label orders: a pure function of (split, index)."""
    found, generator = [episode], episode_rng(ORDERS_SEED, episode.split, episode.index)
    for _ in range(count - 1):
        order = torch.from_numpy(generator.permutation(episode.ways)).to(episode.support.targets.device)
        support, query = (replace(b, targets=order[b.targets]) for b in (episode.support, episode.query))
        found.append(replace(episode, support=support, query=query))
    return found
