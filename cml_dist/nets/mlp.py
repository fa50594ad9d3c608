"""MLP: the backbone of the regression tasks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from cml_dist.config.schema import ModelConfig
from cml_dist.nets.warp import warped
from cml_dist.types import Features


class MLP(nn.Module):
    """Hidden layers with ReLU; ``tap`` and ``pooled`` are both the last hidden vector ``[N, D]`` (``pooled`` warped).

    Args:
        input_dim: size of one input vector.
        hidden: units of each hidden layer.

    Source: CML (UAI 2024), section 5.1 (sinusoid: two hidden layers of 40).
    """

    def __init__(self, input_dim: int, hidden: Sequence[int] = (40, 40)) -> None:
        super().__init__()
        sizes = (input_dim, *hidden)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True))
        self.tap_shape = (hidden[-1],)
        self.pooled_dim = hidden[-1]

    def blocks(self) -> list[list[str]]:
        """Names of the parameters of each layer, first to last, with those of its warp layer."""
        return [[f"layers.{k}.{name}" for name, _ in layer.named_parameters()] for k, layer in enumerate(self.layers)]

    def channel_groups(self) -> list[list[str]]:
        """Names of a weight and its bias, whose rows are units."""
        return [[f"layers.{k}.weight", f"layers.{k}.bias"] for k in range(len(self.layers))]

    def warp_places(self) -> list[tuple[nn.Module, int]]:
        """Behind each layer: the module that owns the warp layer, and its units."""
        return [(layer, layer.out_features) for layer in self.layers]

    def forward(self, inputs: Tensor) -> Features:
        """Features of vectors ``[N, input_dim]``."""
        pooled = inputs
        for layer in self.layers:
            hidden = F.relu(layer(pooled))
            pooled = warped(layer, hidden)
        return Features(tap=hidden, pooled=pooled)


def build(model: ModelConfig, input_shape: tuple[int, ...]) -> MLP:
    return MLP(input_shape[0], model.hidden)
