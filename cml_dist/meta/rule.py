"""What a method is: a pure update over a differentiable support gradient. The default of everything is plain SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

from torch import Tensor

from cml_dist.meta.unlabelled import Unlabelled
from cml_dist.types import BODY, COLEARNER, HEAD, Episode, Params

GradFn = Callable[[Params], Params]
"""The gradient of the support loss at a point of the fast space: d loss(view(point)) / d point, by its names."""

LEARNED_RATES = "rule.lr."
"""Prefix of learned step sizes, before the name of the tensor that they move."""


def part_of(name: str) -> str:
    """The part a canonical parameter name belongs to: ``body``, ``head``, ``colearner`` or ``rule``."""
    return name.partition(".")[0]


def network_part(params: Mapping[str, Tensor]) -> Params:
    """The network's own among parameters, without what a rule adds."""
    return {n: value for n, value in params.items() if part_of(n) in (BODY, HEAD, COLEARNER)}


@dataclass(frozen=True)
class Term:
    """A part of the outer loss: a weighted sum of query losses along the inner loop.

    Attributes:
        weights: of the query loss after each inner step (after none, where there is no step).
        horizon: None: differentiated through the whole path; 1: each visited point is held constant, and one step is
            differentiated (WarpGrad).
        trains: a glob over names of meta-parameters: who gets this term's gradient; after ``!`` all others do.
    """

    weights: tuple[float, ...]
    horizon: int | None = None
    trains: str = "*"

    def moves(self, name: str) -> bool:
        """Whether the meta-parameter of this name gets this term's gradient."""
        return fnmatchcase(name, self.trains.removeprefix("!")) != self.trains.startswith("!")


@dataclass(frozen=True)
class InnerRule:
    """How the inner loop moves, as pure functions; this one is SGD with constant rates. Other methods override members.

    Names: ``meta`` are all meta-parameters; ``fast`` is what the inner loop moves, with whatever state it has
    (moments); ``const`` is what an episode fixes at its start. All members can be differentiated in these tensors.

    Attributes:
        body_lr, head_lr: step sizes; a part with step size 0 does not adapt. The co-learner has the head's.
        adapts: canonical names of the parameters that may adapt; None: all of ``parts``.
        parts: what may adapt; phi does not (eq. 5), save in the paper's control of two heads that both adapt.
    """

    body_lr: float
    head_lr: float
    adapts: frozenset[str] | None = None
    parts: tuple[str, ...] = (BODY, HEAD)

    @property
    def is_sgd(self) -> bool:
        """Whether a step is SGD's, at constant rates, whose transpose is known and needs no forward value."""
        return type(self).update is InnerRule.update

    @property
    def replaces(self) -> tuple[str, ...]:
        """What of the network becomes constant, since the rule's own stands in its place in :meth:`network`."""
        return ()

    def rates(self, names: Iterable[str]) -> dict[str, float]:
        """Step size by name, of the parameters that adapt."""
        by_part = {BODY: self.body_lr, HEAD: self.head_lr, COLEARNER: self.head_lr}
        may = [n for n in names if part_of(n) in self.parts and (self.adapts is None or n in self.adapts)]
        return {n: by_part[part_of(n)] for n in may if by_part[part_of(n)] > 0}

    def init(self, params: Params) -> Params:
        """Initial values of the meta-parameters that the rule adds, by names that begin with ``rule.``.

        Args:
            params: initial values by name of what may adapt: of the network, and of a head that an episode starts.
        """
        return {}

    def start(self, meta: Params, episode: Episode) -> tuple[Params, Params]:
        """(fast_0, constants of the episode), in floating point (a mask too).

        Args:
            meta: all meta-parameters; in their place the head's values where the episode starts them (see heads.py).
        """
        return {n: meta[n] for n in self.rates(meta)}, {}

    def network(self, meta: Params, k: int) -> Params:
        """What the network is in step k before anything adapts, by its own names."""
        return network_part(meta)

    def view(self, meta: Params, fast: Params, const: Params, k: int) -> Params:
        """What the network sees in step k; the query after step k is seen with the same k.

        Args:
            meta: all meta-parameters, and the network's constants (frozen parameters).
        """
        return {**self.network(meta, k), **network_part({**const, **fast})}

    def update(self, meta: Params, fast: Params, const: Params, grad: GradFn, k: int) -> Params:
        """fast_{k+1}, with the names, shapes and types of ``fast``.

        Args:
            grad: may be asked at any point, and more than once; of ``fast`` it is told what it shall differentiate by.

        Source: CML (UAI 2024), eq. 5.
        """
        grads = grad(fast)
        rates = self.rates(fast)
        # Out of place on purpose: gradients may share storage, and fast is the caller's.
        return {n: value - rates[n] * grads[n] for n, value in fast.items()}

    def terms(self, meta_step: int, steps: int) -> tuple[Term, ...]:
        """The outer loss; of MAML the query loss after the last step. Schedules are functions of ``meta_step``."""
        return (Term((0.0,) * (steps - 1) + (1.0,)),)

    def penalty(self, meta: Params, fast: Params, const: Params, episode: Episode) -> Tensor | None:
        """A further outer term at the end of the inner loop, a scalar; None: there is none."""
        return None


class Augmentation(Protocol):
    """Further meta-gradients of an episode, of sub-networks that each have an inner loop of their own.

    Attributes:
        weight: of each sub-network's outer loss beside the whole network's.
    """

    weight: float

    def masks(self, network: Params, slopes: Callable[[], Params], episode: Episode) -> Iterator[Params]:
        """Of each sub-network, what some of the network's tensors are multiplied by, by name; constants.

        Args:
            network: what the network is before anything adapts, as values.
            slopes: the gradient of the support loss there, where it has one.
        """


@dataclass(frozen=True)
class Method:
    """What defines a meta-gradient (paper, eq. 5-7).

    Attributes:
        inner_steps: gradient steps on the support set.
        rule: how they move.
        gamma: weight of the co-learner's loss in the outer loss.
        order: 2 differentiates through the inner loop, 1 takes its gradients as constants.
        both_adapt: the inner loop descends the learner's loss and ``gamma`` times the co-learner's, and phi adapts too
            (the paper's control of two heads that both adapt).
        first_order_steps: meta-steps at the beginning that are of order 1 all the same.
        ascent: the meta-gradient is taken at theta + ascent h / |h|, with h the one at theta over all episodes of the
            meta-step and all meta-parameters (Sharp-MAML's upper level, 2206.03996, algorithm 1); 0: at theta.
        augment: sub-networks whose meta-gradients are added to the whole network's; None: there are none.
        unlabelled: what follows the inner steps in episodes with unlabelled examples; None: these are left out.
    """

    inner_steps: int
    rule: InnerRule
    gamma: float = 0.0
    order: int = 2
    both_adapt: bool = False
    first_order_steps: int = 0
    ascent: float = 0.0
    augment: Augmentation | None = None
    unlabelled: Unlabelled | None = None

    @property
    def steps(self) -> int:
        """Inner steps in all, where episodes have what the method reads."""
        return self.inner_steps + (self.unlabelled.steps if self.unlabelled else 0)

    def at(self, meta_step: int) -> Method:
        """The method as it is in this meta-step: of order 1 in the first ``first_order_steps``."""
        return replace(self, order=1) if meta_step < self.first_order_steps else self

    @property
    def passes(self) -> int:
        """How often a meta-step goes through its episodes."""
        return 2 if self.ascent else 1

    @classmethod
    def sgd(
        cls,
        inner_steps: int,
        body_lr: float,
        head_lr: float,
        gamma: float = 0.0,
        order: int = 2,
        adapts: frozenset[str] | None = None,
    ) -> Method:
        """MAML and its kind: plain SGD with constant rates."""
        return cls(inner_steps, InnerRule(body_lr, head_lr, adapts), gamma, order)
