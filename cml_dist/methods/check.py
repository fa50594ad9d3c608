"""Whether a rule keeps its contract, found out on a small made-up episode before any training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cml_dist.errors import ConfigError
from cml_dist.meta.gradient import Engine, adjoint
from cml_dist.meta.inner import Cotangent, InnerLoop, Point
from cml_dist.meta.problem import Problem, detached
from cml_dist.meta.rule import Method, part_of
from cml_dist.types import BODY, COLEARNER, HEAD, RULE, Batch, Episode, Params

STEPS = 2
"""Inner steps that are tried: the second starts from what the rule itself has made."""


def made_up_episode(input_shape: tuple[int, ...], ways: int, output_dim: int, like: Tensor) -> Episode:
    """Noise: one example of each class in support and query set (``ways`` 0: three examples with targets)."""
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        count = ways or 3
        inputs = torch.randn(count, *input_shape, generator=generator, dtype=torch.float64).to(like)
        targets = torch.randn(count, output_dim, generator=generator, dtype=torch.float64).to(like)
        return Batch(inputs, torch.arange(ways, device=like.device) if ways else targets)

    return Episode(batch(), batch(), "train", 0, ways=ways)


def check_rule(problem: Problem, method: Method, params: Params, episode: Episode) -> None:
    """Try ``method.rule`` on an episode: names and shapes, derivatives, and whether it learns what it declares.

    Args:
        params: all meta-parameters by canonical name.
        episode: any small one.

    Raises:
        ConfigError: ``update`` returns other names, shapes or types than it got, or cannot be differentiated; or one of
            the rule's ``rule.*`` has no influence on the outer loss. With the name, and what to do.

    Cost: some inner steps on the episode. Collective: none.
    """
    kind = type(method.rule).__name__
    loop = InnerLoop(params, episode, problem, replace(method, inner_steps=min(method.inner_steps, STEPS)))
    fast = loop.fast
    for k in range(loop.steps):
        at = Point(loop.meta, fast, loop.const).leaves()
        grad = loop.gradient(at, k, differentiable=method.order == 2)
        after = method.rule.update(dict(at.meta), dict(at.fast), dict(at.const), grad, k)
        _check_update(kind, fast, after, method.order)
        fast = detached(after)
    idle = {n for n in params if n.startswith(f"{RULE}.")}
    for steps in (loop.steps, method.inner_steps):  # what a later step alone uses is found by all of them
        if idle:
            idle -= _learned(InnerLoop(params, episode, problem, replace(method, inner_steps=steps)), method)
    for name in params:
        if name in idle:
            raise ConfigError(
                f"{kind} declares {name}, which the outer loss does not depend on: it would never be learned",
                "use it in start, view or update, set method.inner_steps above 0, or leave it out of init",
            )


def _learned(loop: InnerLoop, method: Method) -> set[str]:
    """The meta-parameters that the outer loss depends on."""
    reached: set[str] = set()
    for term in method.rule.terms(0, loop.steps):
        back = Cotangent()
        way = Engine("adjoint", "sqrt")
        adjoint(loop, replace(term, horizon=None), {"meta": 1.0, "co": method.gamma}, back, way)
        reached |= back.meta.keys()
    return reached


def _check_update(kind: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], order: int) -> None:
    strange = sorted(set(before) ^ set(after))
    if strange:
        what = "leaves out" if strange[0] in before else "adds"
        raise ConfigError(f"{kind}.update {what} {strange[0]}", "return a tensor for each name in fast, and no other")
    for name, value in before.items():
        now = after[name]
        if (now.shape, now.dtype) != (value.shape, value.dtype):
            was = f"{tuple(value.shape)} {value.dtype}"
            raise ConfigError(
                f"{kind}.update gives {name} as {tuple(now.shape)} {now.dtype}, where fast has {was}",
                "return each name of fast with the shape and type that it came with",
            )
        # At first order gradients are constants, and a rule's own state may be one of them.
        may_be_constant = order == 1 and part_of(name) not in (BODY, HEAD, COLEARNER)
        if not now.requires_grad and not may_be_constant:
            raise ConfigError(
                f"{kind}.update gives {name} without a graph, so that no meta-gradient can pass through the step",
                "make it from fast, meta and grad(...) by torch operations, without detach, .data or no_grad",
            )
