"""The meta-gradient: a pure function of parameters and one episode, and two engines that compute it.

Read downwards: :func:`meta_gradient` adapts, takes the outer gradient at the adapted parameters, and pulls it back
through the inner loop. An engine is how the middle part is done; the value is the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cml_dist.meta.inner import SupportLoss, inner_loop, inner_step
from cml_dist.meta.problem import Method, Problem, detached, gradients, part_of, used_by
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
"""Maps d L / d theta_K to d L / d theta_0 (and to the parameters that do not adapt)."""


def meta_gradient(
    params: Params, episode: Episode, problem: Problem, method: Method, engine: str, *, diagnose: bool = False
) -> MetaGradient:
    """Gradient of L(f_m(psi', theta'); Q) + gamma * L(f_c(psi', phi); Q) through the inner loop.

    Args:
        params: psi, theta and phi by canonical name.
        episode: prepared by its domain, on the device of ``params``.
        engine: ``graph`` or ``adjoint``.
        diagnose: also report the cosine between the co-learner's and the meta-learner's gradient.

    Cost: with K inner steps, ``graph`` K forward, backward and double backward passes over the support set and memory
    for all K graphs; ``adjoint`` K forward and backward passes more, and memory for one graph and K parameter copies.
    Both add one forward and backward pass over the query set, ``diagnose`` one more backward pass.
    Collective: none.
    Source: CML (UAI 2024), eq. 5-7.
    """

    def support_loss(p: Params) -> Tensor:
        return problem.support_loss(p, episode.support, episode.context)

    rates = method.rates(list(params))
    steps = method.inner_steps if rates else 0
    engine = "first_order" if method.order == 1 or steps == 0 else engine
    adapted, pull_back = ENGINES[engine](params, rates, support_loss, steps)
    outer, terms = outer_gradient(adapted, episode.query, episode.context, problem, method.gamma, diagnose=diagnose)
    return MetaGradient(pull_back(outer), terms)


def outer_gradient(
    params: Params, query: Batch, context: Mapping[str, Tensor], problem: Problem, gamma: float, *, diagnose: bool
) -> tuple[Params, dict[str, Tensor]]:
    """Gradient of the outer loss (eq. 6) with respect to the *adapted* parameters and phi, with the episode's terms."""
    leaves = detached(params, requires_grad=True)
    outputs = problem.outputs(leaves, query, problem.learners, context)
    losses = [problem.loss(out, query.targets) for out in outputs]
    terms = {"outer_loss": losses[0].detach(), "score": problem.score(outputs[0].detach(), query.targets)}
    total = losses[0]
    if len(losses) == 2:
        terms["colearner_loss"] = losses[1].detach()
        terms["colearner_score"] = problem.score(outputs[1].detach(), query.targets)
        # Adding 0 * loss would turn an overflowing co-learner into NaN: gamma = 0 is MAML to the bit.
        total = losses[0] + gamma * losses[1] if gamma else losses[0]
    diagnose = diagnose and len(losses) == 2
    grads = gradients(total, leaves, retain_graph=diagnose)
    if diagnose:
        body = {n: leaves[n] for n in leaves if part_of(n) == BODY}
        terms["gradient_cosine"] = _cosine_of_parts(grads, gradients(losses[1], body), gamma)
    return grads, terms


def _cosine_of_parts(total: Params, co: Params, gamma: float) -> Tensor:
    """Cosine in psi of the meta-learner's gradient (total - gamma * co) and the co-learner's (a diagnostic)."""
    g_co = torch.cat([g.flatten() for g in co.values()])
    g_meta = torch.cat([total[n].flatten() for n in co]) - gamma * g_co
    return torch.nn.functional.cosine_similarity(g_meta, g_co, dim=0)


# --------------------------------------------------------------------------- engines
# An engine: (params, rates, support loss, steps) -> (theta_K as values, pull back).


def graph(params: Params, rates: Mapping[str, float], loss: SupportLoss, steps: int) -> tuple[Params, PullBack]:
    """Autograd through the unrolled loop: the oracle, and the fastest where K graphs fit into memory."""
    start = detached(params, requires_grad=True)
    current = start
    for _ in range(steps):
        current = inner_step(current, rates, loss, create_graph=True)
    adapted = current

    def pull_back(outer: Params) -> Params:
        return _vector_jacobian(adapted, start, rates, outer)

    return detached(adapted), pull_back


def adjoint(params: Params, rates: Mapping[str, float], loss: SupportLoss, steps: int) -> tuple[Params, PullBack]:
    """Keep theta_0..theta_K as values; then, backwards, recompute one step at a time and pull through it alone.

    For k = K-1..0: lambda_k = (d theta_{k+1} / d theta_k)^T lambda_{k+1}, which for SGD is lambda - alpha * H_k lambda.
    """
    path = inner_loop(params, rates, loss, steps)

    def pull_back(outer: Params) -> Params:
        for theta in reversed(path[:-1]):
            leaves = detached(theta, requires_grad=True)
            after = inner_step(leaves, rates, loss, create_graph=True)
            outer = _vector_jacobian(after, leaves, rates, outer)
        return outer

    return path[-1], pull_back


def first_order(params: Params, rates: Mapping[str, float], loss: SupportLoss, steps: int) -> tuple[Params, PullBack]:
    """Inner gradients as constants: the pull back is the identity (FOMAML)."""
    return inner_loop(params, rates, loss, steps)[-1], lambda outer: outer


ENGINES = {"graph": graph, "adjoint": adjoint, "first_order": first_order}


def _vector_jacobian(after: Params, before: Params, rates: Mapping[str, float], outer: Params) -> Params:
    """``outer`` (a gradient at ``after``) as a gradient at ``before``.

    Parameters that adapt reach ``after`` through the step alone; the others pass unchanged *and* shape the step.
    """
    used = used_by("meta", list(before))  # the support loss never sees phi
    pulled = torch.autograd.grad(
        [after[n] for n in rates],
        [before[n] for n in used],
        [outer[n] for n in rates],
        materialize_grads=True,
    )
    through = dict(zip(used, pulled, strict=True))
    return {n: through[n] if n in rates else outer[n] + through[n] if n in through else outer[n] for n in before}
