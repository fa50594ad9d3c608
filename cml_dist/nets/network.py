"""The network of CML: one body (psi), two heads (theta, phi)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cml_dist.types import Learner


class CmlNet(nn.Module):
    """Body, head (meta-learner) and co-learner in one module.

    Args:
        body: maps inputs ``[N, *input_shape]`` to :class:`cml_dist.types.Features`.
        head: maps ``Features.pooled`` to outputs ``[N, output_dim]``.
        colearner: maps ``Features.tap`` to outputs ``[N, output_dim]``; None for methods without one.

    Source: CML (UAI 2024), section 3: f_m = (psi, theta), f_c = (psi, phi).
    """

    def __init__(self, body: nn.Module, head: nn.Module, colearner: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.colearner = colearner

    def forward(self, inputs: Tensor, learners: Sequence[Learner] = ("meta",), **context: Tensor) -> tuple[Tensor, ...]:
        """Outputs ``[N, output_dim]`` of each learner asked for, from one pass through the body."""
        features = self.body(inputs, **context)
        outputs = []
        for learner in learners:
            if learner == "meta":
                outputs.append(self.head(features.pooled))
            else:
                assert self.colearner is not None, "the co-learner was asked for, but this network has none"
                outputs.append(self.colearner(features.tap))
        return tuple(outputs)
