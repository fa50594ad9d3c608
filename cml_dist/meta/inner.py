"""The inner loop: what one step of adaptation is. The only place that says so, for training and testing alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from cml_dist.meta.problem import Method, Problem, detached, gradients
from cml_dist.types import BODY, HEAD, Episode, Learner, Params

SupportLoss = Callable[[Params], Tensor]
"""The support loss as a function of the parameters alone: a scalar."""


def inner_step(params: Params, rates: Mapping[str, float], loss: SupportLoss, *, create_graph: bool) -> Params:
    """One gradient step on the support set: theta - alpha * grad L(theta; S) for the parameters that adapt.

    Args:
        params: all parameters by name; those in ``rates`` require grad.
        rates: step size by name, of the parameters that adapt; all others are passed on as they are.
        loss: the support loss as a function of ``params``.
        create_graph: keep the graph, so that the step can itself be differentiated.

    Returns:
        All parameters after the step.

    Source: CML (UAI 2024), eq. 5.
    """
    grads = gradients(loss(params), {n: params[n] for n in rates}, create_graph=create_graph)
    # Out of place on purpose: gradients may share storage, and params are the caller's.
    return {**params, **{n: params[n] - rate * grads[n] for n, rate in rates.items()}}


def inner_loop(params: Params, rates: Mapping[str, float], loss: SupportLoss, steps: int) -> list[Params]:
    """The path theta_0 .. theta_K of the inner loop as values, without a graph (K + 1 entries)."""
    path = [detached(params)]
    for _ in range(steps if rates else 0):
        leaves = {n: p.detach().requires_grad_(n in rates) for n, p in path[-1].items()}
        path.append(detached(inner_step(leaves, rates, loss, create_graph=False)))
    return path


def adapt(
    params: Params,
    episode: Episode,
    problem: Problem,
    method: Method,
    learner: Learner = "meta",
    parts: tuple[str, ...] = (BODY, HEAD),
) -> Params:
    """The parameters after the whole inner loop on an episode's support set, as values.

    Args:
        learner: whose support loss is descended: ``meta`` (eq. 8) or ``co`` (eq. 9, where phi stays frozen).
        parts: what adapts; for eq. 9 only the body.
    """

    def loss(p: Params) -> Tensor:
        return problem.support_loss(p, episode.support, episode.context, learner)

    return inner_loop(params, method.rates(list(params), parts), loss, method.inner_steps)[-1]
