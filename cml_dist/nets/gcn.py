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

    An output depends on its node's row of A, and on the rows of A X of that node's neighbours, alone: these the domain
    hands over, so that the pass is the whole graph's, exactly, and costs what the neighbourhoods do.

    Args:
        features: F, of a node.
        hidden: units of the two layers.

    Source: Kipf and Welling, 1609.02907, eq. 9; initial values uniform in +-1/sqrt(units), as in their code.
    """

    couples_examples = True
    """Examples share the rows of their neighbourhoods."""

    def __init__(self, features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        sizes = (features, *hidden)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True))
        for layer in self.layers:
            for value in layer.parameters():
                nn.init.uniform_(value, -(layer.out_features**-0.5), layer.out_features**-0.5)
        self.tap_shape = (hidden[-1],)
        self.pooled_dim = hidden[-1]

    def blocks(self) -> list[list[str]]:
        """Names of the parameters of each layer, first to last."""
        return [[f"layers.{number}.weight", f"layers.{number}.bias"] for number in range(len(self.layers))]

    def forward(self, inputs: Tensor, features: Tensor | None = None, keep: Tensor | None = None) -> Features:
        """Features of nodes ``[N]``.

        Args:
            inputs: ``[N, M]``, the nodes' rows of A, of the M nodes that any of them sees; without ``features`` those
                of isolated nodes, ``[N, F]``.
            features: ``[M, F]``, the rows of A X of those M.
            keep: dropout of the hidden units: what each is multiplied by, ``[M, units or more]``.
        """
        hidden = F.relu(self.layers[0](inputs if features is None else features))
        if keep is not None:
            hidden = hidden * keep[:, : hidden.shape[1]].to(hidden.dtype)
        if features is not None:
            hidden = inputs @ hidden
        out = self.layers[1](hidden)
        return Features(tap=out, pooled=out)


def build(model: ModelConfig, input_shape: tuple[int, ...]) -> GCN:
    if len(model.hidden) != 2:
        raise ConfigError(f"model.hidden is {list(model.hidden)}, but a gcn has two layers", "give two, e.g. [16, 16]")
    return GCN(input_shape[0], model.hidden)
