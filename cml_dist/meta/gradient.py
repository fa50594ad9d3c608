"""The meta-gradient: a pure function of parameters and one episode, and two engines that compute it.

Read downwards: :func:`meta_gradient` adapts, takes the outer gradient at the adapted parameters, and pulls it back
through the inner loop. An engine is how the middle part is done; the value is the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cml_dist.meta.inner import inner_loop, inner_step, last, pull_back_step
from cml_dist.meta.problem import (
    Method,
    Problem,
    SupportLoss,
    accumulate,
    detached,
    gradients,
    part_of,
    used_by,
)
from cml_dist.types import BODY, Batch, Episode, Params


@dataclass(frozen=True)
class MetaGradient:
    """The meta-gradient of one episode.

    Attributes:
        grads: d (outer loss) / d (psi, theta, phi) by canonical name; no graph hangs on them.
        terms: scalars of the episode: ``outer_loss``, ``score``; with a co-learner ``colearner_loss``,
            ``colearner_score``; on request ``gradient_cosine``.
    """

    grads: Params
    terms: dict[str, Tensor]


PullBack = Callable[[Params], Params]
"""Maps d L / d theta_K, which it may overwrite, to d L / d theta_0 (and to the parameters that do not adapt)."""


def meta_gradient(
    params: Params,
    episode: Episode,
    problem: Problem,
    method: Method,
    engine: str,
    *,
    diagnose: bool = False,
    path_device: torch.device | None = None,
) -> MetaGradient:
    """Gradient of L(f_m(psi', theta'); Q) + gamma * L(f_c(psi', phi); Q) through the inner loop.

    Args:
        params: psi, theta and phi by canonical name.
        episode: prepared by its domain, on the device of ``params``.
        problem: the network's loss; its ``micro_batch`` bounds what passes through the network at once.
        engine: ``graph`` or ``adjoint``.
        diagnose: also report the cosine between the co-learner's and the meta-learner's gradient.
        path_device: where ``adjoint`` keeps the adapted parameters of each step (e.g. the CPU); None: where they are.

    Cost: with K inner steps, ``graph`` K forward, backward and double backward passes over the support set and memory
    for all K graphs; ``adjoint`` K forward and backward passes more, and memory for one graph of a micro-batch and K
    copies of what adapts. Both add one forward and backward pass over the query set, ``diagnose`` one more backward.
    Collective: none.
    Source: CML (UAI 2024), eq. 5-7.
    """
    support_loss = problem.support_loss(episode.support, episode.context)
    rates = method.rates(list(params))
    steps = method.inner_steps if rates else 0
    if method.order == 1 or steps == 0:
        adapted, pull_back = first_order(params, rates, support_loss, steps)
    else:
        engines = {"graph": graph, "adjoint": partial(adjoint, path_device=path_device)}
        adapted, pull_back = engines[engine](params, rates, support_loss, steps)
    outer, terms = outer_gradient(adapted, episode.query, episode.context, problem, method.gamma, diagnose=diagnose)
    del adapted
    return MetaGradient(pull_back(outer), terms)


def outer_gradient(
    params: Params, query: Batch, context: Mapping[str, Tensor], problem: Problem, gamma: float, *, diagnose: bool
) -> tuple[Params, dict[str, Tensor]]:
    """Gradient of the outer loss (eq. 6) with respect to the *adapted* parameters and phi, with the episode's terms.

    The gradient's tensors are new ones that the caller owns.
    """
    leaves = detached(params, requires_grad=True)
    grads = {n: torch.zeros_like(p) for n, p in params.items()}
    body = {n: leaves[n] for n in leaves if part_of(n) == BODY}
    diagnose = diagnose and len(problem.learners) == 2 and bool(body)  # a body that is all frozen has no gradient
    co_grads = {n: torch.zeros_like(p) for n, p in body.items()} if diagnose else {}
    parts, values = [], []
    for part, weight in problem.micro_batches(query):
        outputs = problem.outputs(leaves, part, problem.learners, context)
        losses = [weight * problem.loss(out, part.targets) for out in outputs]
        # Adding 0 * loss would turn an overflowing co-learner into NaN: gamma = 0 is MAML to the bit.
        total = losses[0] + gamma * losses[1] if len(losses) == 2 and gamma else losses[0]
        accumulate(grads, gradients(total, leaves, retain_graph=diagnose))
        if diagnose:
            accumulate(co_grads, gradients(losses[1], body))
        parts.append([out.detach() for out in outputs])
        values.append([loss.detach() for loss in losses])
    outputs = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    losses = [torch.stack(pieces).sum() for pieces in zip(*values, strict=True)]
    terms = {"outer_loss": losses[0], "score": problem.score(outputs[0], query.targets)}
    if len(losses) == 2:
        terms["colearner_loss"] = losses[1]
        terms["colearner_score"] = problem.score(outputs[1], query.targets)
    if diagnose:
        terms["gradient_cosine"] = _cosine_of_parts(grads, co_grads, gamma)
    return grads, terms


def _cosine_of_parts(total: Params, co: Params, gamma: float) -> Tensor:
    """Cosine in psi of the meta-learner's gradient (total - gamma * co) and the co-learner's (a diagnostic)."""
    dot = meta = other = next(iter(co.values())).new_zeros(())
    for name, g_co in co.items():
        g_meta = total[name] - gamma * g_co
        dot, meta, other = dot + (g_meta * g_co).sum(), meta + g_meta.square().sum(), other + g_co.square().sum()
    return dot / (meta.sqrt() * other.sqrt()).clamp_min(1e-8)


# --------------------------------------------------------------------------- engines
# An engine: (params, rates, support loss, steps) -> (theta_K as values, pull back).


def graph(params: Params, rates: Mapping[str, float], loss: SupportLoss, steps: int) -> tuple[Params, PullBack]:
    """Autograd through the unrolled loop: the oracle, and the fastest where K graphs fit into memory."""
    start = detached(params, requires_grad=True)
    current = start
    for _ in range(steps):
        current = inner_step(current, rates, loss, create_graph=True)
    unrolled = [current]

    def pull_back(outer: Params) -> Params:
        """Parameters that adapt reach theta_K through the steps alone; the others pass *and* shape the steps."""
        used = used_by("meta", list(start))  # the support loss never sees phi
        adapted = unrolled.pop()
        pulled = torch.autograd.grad(
            [adapted[n] for n in rates],
            [start[n] for n in used],
            [outer[n] for n in rates],
            materialize_grads=True,
        )
        through = dict(zip(used, pulled, strict=True))
        return {n: through[n] if n in rates else outer[n] + through[n] if n in through else outer[n] for n in start}

    return detached(current), pull_back


def adjoint(
    params: Params,
    rates: Mapping[str, float],
    loss: SupportLoss,
    steps: int,
    path_device: torch.device | None = None,
) -> tuple[Params, PullBack]:
    """Keep theta_0..theta_K as values; then, backwards, recompute one step at a time and pull through it alone.

    For k = K-1..0: lambda_k = (d theta_{k+1} / d theta_k)^T lambda_{k+1}, which for SGD is lambda - H_k alpha lambda.
    """
    path: list[Params] = []  # of theta_0 .. theta_{K-1} what adapts: the rest is in params
    for theta in inner_loop(params, rates, loss, steps):
        path.append({n: theta[n] if path_device is None else theta[n].to(path_device) for n in rates})
    path.pop()

    def pull_back(outer: Params) -> Params:
        while path:
            then = {n: value.to(params[n].device) for n, value in path.pop().items()}
            pull_back_step({**params, **then}, rates, loss, outer)
        return outer

    return theta, pull_back


def first_order(params: Params, rates: Mapping[str, float], loss: SupportLoss, steps: int) -> tuple[Params, PullBack]:
    """Inner gradients as constants: the pull back is the identity (FOMAML)."""
    return last(inner_loop(params, rates, loss, steps)), lambda outer: outer
