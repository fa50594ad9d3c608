"""The network of CML: one body (psi), two heads (theta, phi)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn.functional import normalize

from cml_dist.types import HEAD, RULE, Params


class CmlNet(nn.Module):
    """Body, head (meta-learner) and co-learner in one module, and what a method learns beside them.

    Args:
        body: maps inputs ``[N, *input_shape]`` to :class:`cml_dist.types.Features`.
        head: maps ``Features.pooled`` to outputs ``[N, output_dim]``; see ``heads.py``.
        colearner: maps ``Features.tap`` to outputs ``[N, output_dim]``, or to embeddings ``[N, E]``; None for methods
            without one.
        prototypes: whether the co-learner's embeddings are compared with the classes' means of the support set.
        feature_length: to which ``Features.pooled`` of each example is scaled; None: as they are.

    Attributes:
        compared: the learners whose outputs are embeddings of that kind.

    Source: CML (UAI 2024), section 3: f_m = (psi, theta), f_c = (psi, phi).
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        colearner: nn.Module | None = None,
        *,
        prototypes: bool = False,
        feature_length: float | None = None,
    ) -> None:
        super().__init__()
        self.body, self.head, self.colearner, self.feature_length = body, head, colearner, feature_length
        compared = {"meta": getattr(head, "compares", False), "co": prototypes}
        self.compared = tuple(learner for learner, by_prototypes in compared.items() if by_prototypes)

    def forward(self, inputs: Tensor, learners: Sequence[str] = ("meta",), **context: Tensor) -> tuple[Tensor, ...]:
        """What is asked for, from one pass through the body: ``meta``, ``co`` (their outputs) or ``pooled``."""
        features = self.body(inputs, **context)
        pooled, outputs = features.pooled, []
        if self.feature_length is not None:
            pooled = self.feature_length * normalize(pooled)
        for learner in learners:
            if learner == "meta":
                outputs.append(self.head(pooled))
            elif learner == "pooled":
                outputs.append(pooled)
            else:
                outputs.append(self.colearner(features.tap))
        return tuple(outputs)

    @property
    def starts_head(self) -> bool:
        """Whether each episode starts the head's weight and bias (see ``heads.py``)."""
        return hasattr(self.head, "start")

    def make_constant(self, names: Iterable[str]) -> None:
        """Turn parameters into constants (buffers) of the same values, in place."""
        for name in names:
            path, _, own = name.rpartition(".")
            owner = self.get_submodule(path)
            value = getattr(owner, own)
            delattr(owner, own)
            owner.register_buffer(own, value.detach().clone())

    def fitting(self, values: Params) -> Params:
        """Those of ``values`` that are a parameter or constant here, by name and shape."""
        own = self.own_values()
        return {n: value for n, value in values.items() if n in own and own[n].shape == value.shape}

    def take_over(self, values: Params) -> None:
        """Set all that :meth:`fitting` names to these values, in place."""
        own = self.own_values()
        for name, value in self.fitting(values).items():
            own[name].copy_(value)

    def own_values(self) -> Params:
        """Parameters and floating-point constants by canonical name, which share storage with the network's."""
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {n: value.detach() for n, value in named.items() if value.is_floating_point()}

    def add_rule(self, learned: Params, replaces: Sequence[str] = ()) -> None:
        """Take over initial values of what a rule learns, under their own names, which begin with ``rule.``.

        Args:
            replaces: own parameters in whose place these stand: they become constants.
        """
        named = dict(self.named_parameters())
        self.make_constant(n for n in replaces if n in named)
        for name, value in learned.items():
            path, _, own = name.rpartition(".")
            owner: nn.Module = self
            for child in path.split("."):
                if not hasattr(owner, child):
                    owner.add_module(child, nn.Module())
                owner = getattr(owner, child)
            owner.register_parameter(own, nn.Parameter(value.detach().clone()))

    def adaptable(self) -> Params:
        """What may adapt in the inner loop, by canonical name.

        Of a head that an episode starts, the weight and bias that it then has, for one class: ``[1, D]`` and ``[1]``.
        """
        named = {n: p.detach() for n, p in self.named_parameters() if not n.startswith(f"{RULE}.")}
        if self.starts_head:
            some = next(self.parameters())
            named = {n: p for n, p in named.items() if not n.startswith(f"{HEAD}.")}
            named |= {f"{HEAD}.weight": some.new_zeros(1, self.head.dim), f"{HEAD}.bias": some.new_zeros(1)}
        return named
