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
        adapts: canonical names of the parameters that may adapt; None: all of body and head.
    """

    inner_steps: int
    body_lr: float
    head_lr: float
    gamma: float = 0.0
    order: int = 2
    adapts: frozenset[str] | None = None

    def rates(self, names: Sequence[str], parts: Sequence[str] = (BODY, HEAD)) -> dict[str, float]:
        """Step size by name, of the parameters that adapt; the co-learner never does (eq. 5)."""
        by_part = {BODY: self.body_lr, HEAD: self.head_lr}
        may = [n for n in names if part_of(n) in parts and (self.adapts is None or n in self.adapts)]
        return {n: by_part[part_of(n)] for n in may if by_part[part_of(n)] > 0}


SupportLoss = Sequence[Callable[[Params], Tensor]]
"""A mean loss as a sum of terms, each a scalar function of the parameters: one term, or one a micro-batch."""


class Problem:
    """Loss and score of a network at *given* parameters: a pure function of them.

    Args:
        net: a :class:`cml_dist.nets.network.CmlNet`; only its structure is kept (a copy on the ``meta`` device).
        loss: mean loss of outputs and targets over the examples, a scalar (the domain's).
        score: mean score of outputs and targets over the examples, a scalar (the domain's).
        buffers: constants of the network by name (running statistics, frozen weights: nothing writes them).
        micro_batch: most examples that pass through the network at once; None: all of a set. The sum over
            micro-batches is the same value, as long as no norm of the network couples examples.
        autocast: type of the arithmetic inside the network (``torch.bfloat16``), or None for that of the parameters.
            Parameters, adapted ones too, and losses stay in their own type: a bfloat16 weight has 8 bits, and an inner
            step below 0.4 % of it would vanish.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        score: Callable[[Tensor, Tensor], Tensor],
        buffers: Mapping[str, Tensor],
        micro_batch: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.structure = copy.deepcopy(net).to("meta").eval()
        self.loss = loss
        self.score = score
        self.buffers = buffers
        self.micro_batch = micro_batch
        self.autocast = autocast
        self.learners: tuple[Learner, ...] = ("meta",) if net.colearner is None else ("meta", "co")

    def outputs(
        self, params: Params, batch: Batch, learners: Sequence[Learner], context: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Outputs ``[N, output_dim]`` of each learner at ``params``, from one pass through the body."""
        # Parameters that the asked-for heads do not use may be absent, so strict stays off; a missing one that *is*
        # used would be a tensor on the meta device and fail at once.
        state = {**self.buffers, **params}
        arguments = (batch.inputs,), {"learners": learners, **context}
        if self.autocast is None:
            return functional_call(self.structure, state, *arguments)
        # A context a call, left before any gradient is taken: autocast's cache of cast weights dies with it, and cannot
        # hand a weight that was cast without a graph to a pass that needs one.
        with torch.autocast(batch.inputs.device.type, self.autocast):
            outputs = functional_call(self.structure, state, *arguments)
        return tuple(out.to(batch.inputs.dtype) for out in outputs)

    def micro_batches(self, batch: Batch) -> list[tuple[Batch, float]]:
        """The batch in pieces of at most ``micro_batch`` examples, each with its weight in a mean over examples."""
        size = self.micro_batch
        total = len(batch.targets)
        if size is None or size >= total:
            return [(batch, 1.0)]
        inputs, targets = batch.inputs.split(size), batch.targets.split(size)
        return [(Batch(x, t), len(t) / total) for x, t in zip(inputs, targets, strict=True)]

    def support_loss(self, support: Batch, context: Mapping[str, Tensor], learner: Learner = "meta") -> SupportLoss:
        """L(f; S): the loss of one learner on the support set, as terms of the parameters."""

        def term(part: Batch, weight: float) -> Callable[[Params], Tensor]:
            def loss(params: Params) -> Tensor:
                (outputs,) = self.outputs(params, part, (learner,), context)
                return weight * self.loss(outputs, part.targets)

            return loss

        return [term(part, weight) for part, weight in self.micro_batches(support)]

    def query_score(self, params: Params, query: Batch, context: Mapping[str, Tensor], learner: Learner) -> Tensor:
        """The score of one learner on the query set, a scalar without gradient."""
        with torch.no_grad():
            outputs = [self.outputs(params, part, (learner,), context)[0] for part, _ in self.micro_batches(query)]
            return self.score(torch.cat(outputs), query.targets)


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


def accumulate(total: Params, grads: Params) -> None:
    """Add ``grads`` to ``total``, in place. Never the other way round: what autograd returns may share storage."""
    for name, grad in grads.items():
        total[name].add_(grad)
