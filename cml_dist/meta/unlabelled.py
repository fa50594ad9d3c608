"""Unlabelled examples in the inner loop: what they cost, the labels they get, and how these are refined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cml_dist.types import Params

LABELS = "unlabelled.labels"
"""The soft labels ``[U, ways]`` among the fast values, from the first step that reads them on; a constant of a step."""


@dataclass(frozen=True)
class Unlabelled:
    """What an inner loop does with unlabelled examples after its steps on the support set alone.

    Attributes:
        steps: on both sets, with the support loss plus ``weight`` times :func:`consistency` with the labels.
        temperature: of the softmax that makes the labels; below 1 they are sharpened.
        refinement: step along the meta-gradient of the labels, an example (times their number); 0: none.
    """

    steps: int
    weight: float = 1.0
    temperature: float = 1.0
    refinement: float = 0.0


def without_labels(fast: Params) -> Params:
    """The fast values that are the rule's."""
    return {n: value for n, value in fast.items() if n != LABELS}


def consistency(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over the examples of |softmax(outputs) - labels|^2, of ``[N, ways]`` each; bounded, whatever the labels."""
    return (outputs.softmax(1) - labels).square().sum(1).mean()


def soft_labels(
    how: Unlabelled,
    outputs: Callable[[Sequence[Tensor]], Tensor],
    inputs: Sequence[Tensor],
    rates: Params | dict[str, float],
    places: Sequence[int],
    gradient: Callable[[Params], Params],
) -> Tensor:
    """Labels ``[U, ways]`` by the adapted learner, one step of descent on the labelled loss after a virtual step.

    With p the learner's probabilities at theta, y = softmax(outputs / temperature), C the consistency of both and
    theta' = theta - alpha grad C the virtual step, d L(theta') / d y = 2 alpha / U J_p grad L(theta'), and the labels
    are y - refinement U times that, with what is below 0 set to 0, and rows scaled to add up to 1 again. Where the
    temperature is 1, p is y, and theta' is theta: its step has no length, but a derivative.

    Args:
        outputs: of the unlabelled examples, ``[U, ways]``, as a function of ``inputs``, which require grad.
        rates: step sizes alpha of the virtual step by name; ``places`` are the tensors of these names in ``inputs``.
        gradient: of the labelled loss L at values of these names; all derivatives are of second order at most.

    Source: Xiao et al., 2007.03966; its scale, and how labels stay probabilities, are choices made here.
    """
    fast = {n: inputs[place].view_as(inputs[place]) for n, place in zip(rates, places, strict=True)}
    nodes = dict(zip(places, fast.values(), strict=True))
    scores = outputs([nodes.get(place, value) for place, value in enumerate(inputs)])
    labels = (scores / how.temperature).softmax(1)
    if not how.refinement:
        return labels
    if how.temperature != 1:
        probabilities = scores.softmax(1)
        residual = 2 / len(labels) * (probabilities - labels)
        slopes = torch.autograd.grad(
            probabilities, list(fast.values()), residual, create_graph=True, materialize_grads=True
        )
        moved = {n: fast[n] - rates[n] * slope for n, slope in zip(fast, slopes, strict=True)}
    else:
        moved = {n: inputs[place] for n, place in zip(rates, places, strict=True)}
    down = gradient(moved)
    vector = [rate * down[n] for n, rate in rates.items()]
    turned = _Directional.apply(lambda at: outputs(at).softmax(1), tuple(places), len(inputs), *inputs, *vector)
    kept = (labels - 2 * how.refinement * turned).clamp_min(0)
    return kept / kept.sum(1, keepdim=True)


class _Directional(torch.autograd.Function):
    """J v of a function of tensors, with v on those at ``places``: two reverse passes, and for its derivative one more.

    Written as one function since the network has no third derivative (``nets/second_order.py``), nor a forward mode.
    """

    @staticmethod
    def forward(ctx, function: Callable, places: tuple[int, ...], count: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.places, ctx.count = function, places, count
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in tensors[:count]]
            out = function(leaves)
            seed = torch.zeros_like(out).requires_grad_()
            pulled = torch.autograd.grad(
                out, [leaves[p] for p in places], seed, create_graph=True, materialize_grads=True
            )
            pairs = [(p, v) for p, v in zip(pulled, tensors[count:], strict=True) if p.requires_grad]
            (turned,) = torch.autograd.grad([p for p, _ in pairs], seed, [v for _, v in pairs])
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx, by: Tensor):
        inputs, vector = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in inputs]
            pulled = torch.autograd.grad(
                ctx.function(leaves), [leaves[p] for p in ctx.places], by, create_graph=True, materialize_grads=True
            )
            pairs = [(p, v) for p, v in zip(pulled, vector, strict=True) if p.requires_grad]
            through = torch.autograd.grad([p for p, _ in pairs], leaves, [v for _, v in pairs], allow_unused=True)
        return None, None, None, *through, *(p.detach() for p in pulled)
