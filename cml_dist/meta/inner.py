"""The inner loop: what one step of adaptation is. The only place that says so, for training and testing alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

import torch

from cml_dist.meta.problem import Method, Problem, SupportLoss, accumulate, detached, gradients, used_by
from cml_dist.types import BODY, HEAD, Episode, Learner, Params


def inner_step(params: Params, rates: Mapping[str, float], loss: SupportLoss, *, create_graph: bool) -> Params:
    """One gradient step on the support set: theta - alpha * grad L(theta; S) for the parameters that adapt.

    Args:
        params: all parameters by name; those in ``rates`` require grad.
        rates: step size by name, of the parameters that adapt; all others are passed on as they are.
        loss: the support loss as terms of ``params``.
        create_graph: keep the graph, so that the step can itself be differentiated.

    Returns:
        All parameters after the step.

    Cost: without a graph, memory of one term. Source: CML (UAI 2024), eq. 5.
    """
    adapting = {n: params[n] for n in rates}
    after = params
    for term in loss:
        grads = gradients(term(params), adapting, create_graph=create_graph)
        # Out of place on purpose: gradients may share storage, and params are the caller's.
        after = {**after, **{n: after[n] - rate * grads[n] for n, rate in rates.items()}}
        if not create_graph:
            after = detached(after)
    return after


def pull_back_step(theta: Params, rates: Mapping[str, float], loss: SupportLoss, outer: Params) -> None:
    """Turn ``outer``, a gradient at ``inner_step(theta)``, into the gradient at ``theta``; in place.

    The transposed Jacobian of the step: lambda - H alpha lambda, where H has the rows of all parameters that the
    support loss depends on: those that do not adapt pass unchanged *and* shape the step.

    Args:
        theta: parameters before the step, as values.
        outer: gradient by name; the caller's own tensors, overwritten.

    Cost: one Hessian-vector product a term (reverse over reverse), memory of one term's graph, three copies of the
    parameters that adapt and one of all.
    """
    used = used_by("meta", list(theta))  # the support loss never sees phi
    vector = {n: -rate * outer[n] for n, rate in rates.items()}
    for term in loss:
        leaves = detached(theta, requires_grad=True)
        grads = gradients(term(leaves), {n: leaves[n] for n in rates}, create_graph=True)
        curved = [n for n, grad in grads.items() if grad.requires_grad]  # the others are constants
        if not curved:
            continue
        through = torch.autograd.grad(
            [grads[n] for n in curved],
            [leaves[n] for n in used],
            [vector[n] for n in curved],
            materialize_grads=True,
        )
        del grads, leaves
        accumulate(outer, dict(zip(used, through, strict=True)))


def inner_loop(params: Params, rates: Mapping[str, float], loss: SupportLoss, steps: int) -> Iterator[Params]:
    """theta_0 .. theta_K as values, without a graph (K + 1 of them; each is the caller's to keep or to drop)."""
    theta = detached(params)
    yield theta
    for _ in range(steps if rates else 0):
        leaves = {n: p.detach().requires_grad_(n in rates) for n, p in theta.items()}
        theta = inner_step(leaves, rates, loss, create_graph=False)
        yield theta


def last(path: Iterator[Params]) -> Params:
    """The end of an inner loop, with no more than two of its points in memory."""
    (theta,) = deque(path, maxlen=1)
    return theta


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
    loss = problem.support_loss(episode.support, episode.context, learner)
    return last(inner_loop(params, method.rates(list(params), parts), loss, method.inner_steps))
