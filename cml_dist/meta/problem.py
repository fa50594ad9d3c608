"""What is differentiated: a stateless network with the domain's loss and score, and the method's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cml_dist.types import BODY, COLEARNER, HEAD, Batch, Learner, Params


def part_of(name: str) -> str:
    """The part a canonical parameter name belongs to: ``body`` (psi), ``head`` (theta) or ``colearner`` (phi)."""
    return name.partition(".")[0]


@dataclass(frozen=True)
class Method:
    """The numbers that define a meta-gradient (paper, eq. 5-7).

    Attributes:
        inner_steps: gradient steps on the support set.
        body_lr, head_lr: step sizes of the inner loop; a part with step size 0 does not adapt.
        gamma: weight of the co-learner's loss in the outer loss.
        order: 2 differentiates through the inner loop, 1 takes its gradients as constants.
    """

    inner_steps: int
    body_lr: float
    head_lr: float
    gamma: float = 0.0
    order: int = 2

    def rates(self, names: Sequence[str], parts: Sequence[str] = (BODY, HEAD)) -> dict[str, float]:
        """Step size by name, of the parameters that adapt; the co-learner never does (eq. 5)."""
        by_part = {BODY: self.body_lr, HEAD: self.head_lr}
        return {n: by_part[part_of(n)] for n in names if part_of(n) in parts and by_part[part_of(n)] > 0}


class Problem:
    """Loss and score of a network at *given* parameters: a pure function of them.

    Args:
        net: a :class:`cml_dist.nets.network.CmlNet`; only its structure is kept (a copy on the ``meta`` device).
        loss: mean loss of outputs and targets, a scalar (the domain's).
        score: mean score of outputs and targets, a scalar (the domain's).
        buffers: constants of the network by name (running statistics stay as they are: nothing writes them).
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        score: Callable[[Tensor, Tensor], Tensor],
        buffers: Mapping[str, Tensor],
    ) -> None:
        self.structure = copy.deepcopy(net).to("meta").eval()
        self.loss = loss
        self.score = score
        self.buffers = buffers
        self.learners: tuple[Learner, ...] = ("meta",) if net.colearner is None else ("meta", "co")

    def outputs(
        self, params: Params, batch: Batch, learners: Sequence[Learner], context: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Outputs ``[N, output_dim]`` of each learner at ``params``, from one pass through the body."""
        # Parameters that the asked-for heads do not use may be absent, so strict stays off; a missing one that *is*
        # used would be a tensor on the meta device and fail at once.
        state = {**self.buffers, **params}
        return functional_call(self.structure, state, (batch.inputs,), {"learners": learners, **context})

    def support_loss(
        self, params: Params, support: Batch, context: Mapping[str, Tensor], learner: Learner = "meta"
    ) -> Tensor:
        """L(f; S): the loss of one learner on the support set, a scalar."""
        (outputs,) = self.outputs(params, support, (learner,), context)
        return self.loss(outputs, support.targets)


def used_by(learner: Learner, names: Sequence[str]) -> list[str]:
    """The parameters that one learner's outputs depend on: the body and its own head."""
    own = HEAD if learner == "meta" else COLEARNER
    return [n for n in names if part_of(n) in (BODY, own)]


def detached(params: Params, requires_grad: bool = False) -> Params:
    """New leaves that share the values of ``params``."""
    return {n: p.detach().requires_grad_(requires_grad) for n, p in params.items()}


def gradients(loss: Tensor, inputs: Params, *, create_graph: bool = False, retain_graph: bool | None = None) -> Params:
    """d loss / d inputs by name; zeros where the loss does not depend on one (e.g. an unused class token)."""
    grads = torch.autograd.grad(
        loss, list(inputs.values()), create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
    )
    return dict(zip(inputs, grads, strict=True))
