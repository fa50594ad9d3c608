"""GCN: the backbone for nodes of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from cml_dist.config.schema import ModelConfig
from cml_dist.errors import ConfigError
from cml_dist.types import Features


class GCN(nn.Module):
    """Two graph convolutions, out = A relu((A X) W1 + b1) W2 + b2; ``tap`` and ``pooled`` are both ``out``.

    A node's ``out`` depends on its row of A, and on its neighbours' rows of A X, alone. These the domain hands over, so
    that the pass is exactly the whole graph's, and costs what the neighbourhoods do.

    Source: Kipf and Welling, 1609.02907, eq. 9; initial values uniform in +-1/sqrt(units), as in their code.
    """

    couples_examples = True  # they share the rows of their neighbourhoods

    def __init__(self, features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(features, hidden[0]), nn.Linear(*hidden)])
        for layer in self.layers:
            for value in layer.parameters():
                nn.init.uniform_(value, -(layer.out_features**-0.5), layer.out_features**-0.5)
        self.tap_shape = (hidden[-1],)
        self.pooled_dim = hidden[-1]

    def blocks(self) -> list[list[str]]:
        """Names of the parameters of each layer, first to last."""
        return [[f"layers.{number}.weight", f"layers.{number}.bias"] for number in range(2)]

    channel_groups = blocks

    def forward(self, inputs: Tensor, features: Tensor | None = None, keep: Tensor | None = None) -> Features:
        """Features of N nodes.

        Args:
            inputs: ``[N, M]``, rows of A in the columns of the M nodes that any of them sees; without ``features``
                features of isolated nodes, ``[N, F]``.
            features: ``[M, F]``, rows of A X.
            keep: dropout: what each hidden unit is multiplied by, ``[M, units or more]``.
        """
        hidden = F.relu(self.layers[0](inputs if features is None else features))
        if keep is not None:
            hidden = hidden * keep[:, : hidden.shape[1]]
        out = self.layers[1](hidden if features is None else inputs @ hidden)
        return Features(tap=out, pooled=out)


def build(model: ModelConfig, input_shape: tuple[int, ...]) -> GCN:
    if len(model.hidden) != 2:
        raise ConfigError(f"model.hidden is {list(model.hidden)}, but a gcn has two layers", "give two, e.g. [16, 16]")
    return GCN(input_shape[0], model.hidden)
