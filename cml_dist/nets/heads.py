"""Heads (theta): a linear layer, and linear layers whose weight and bias each episode starts anew.

A started head owns meta-parameters of its own (or none), takes any number of classes, and has

- ``dim``: features D that it reads;
- ``start(own, features, targets, ways)``: weight ``[ways, D]`` and bias ``[ways]`` at the start of an episode;
- ``reads_support``: whether it is started from the support set's features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cml_dist.meta.problem import class_means
from cml_dist.registry import HEADS
from cml_dist.types import Params


class StartedHead(nn.Module):
    """A linear layer whose weight and bias an episode starts; a kind of head says how."""

    reads_support = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def start(self, own: Params, features: Tensor | None, targets: Tensor, ways: int) -> Params:
        """Weight ``[ways, D]`` and bias ``[ways]``, from own meta-parameters and the support set's features."""
        raise NotImplementedError

    def forward(self, pooled: Tensor) -> Tensor:
        return F.linear(pooled, self.weight, self.bias)


class SharedHead(StartedHead):
    """All classes start from one learned vector, so that no order of the labels is preferred.

    Under cross-entropy the vector's own gradient is exactly 0 (what all classes share changes no softmax): it stays as
    it was initialised, but for an outer Adam's steps along rounding noise, which change no output either.

    Source: UNICORN-MAML (Ye and Chao, 2106.16245), section 6.
    """

    reads_support = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        made = nn.Linear(dim, 1)
        self.weight, self.bias = made.weight, made.bias

    def start(self, own: Params, features: Tensor | None, targets: Tensor, ways: int) -> Params:
        return {"weight": own["weight"].repeat(ways, 1), "bias": own["bias"].repeat(ways)}


class CentroidHead(StartedHead):
    """Classes start from the mean feature of their support examples; it learns nothing of its own.

    Its outputs are minus the squared distances to these means, but for what all classes share: with no inner steps it
    is a prototypical network.

    Source: Proto-MAML (Triantafillou et al., 1903.03096), section 3.2; Snell et al., 1703.05175, eq. 8.
    """

    def start(self, own: Params, features: Tensor | None, targets: Tensor, ways: int) -> Params:
        means = class_means(features, targets, ways)
        return {"weight": 2 * means, "bias": -means.square().sum(1)}


class RidgeHead(StartedHead):
    """Classes start from the ridge regression of their one-hot labels on the support features, in closed form.

    It learns the regulariser (its logarithm), and scale and offset of the outputs. With no inner steps it is R2-D2's.

    Source: Bertinetto et al., 1805.08136, eq. 6 and 7 (Woodbury form: a system of as many equations as examples).
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.log_lambda = nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))
        self.offset = nn.Parameter(torch.zeros(1))

    def start(self, own: Params, features: Tensor | None, targets: Tensor, ways: int) -> Params:
        labels = (targets[:, None] == torch.arange(ways, device=targets.device)).to(features.dtype)
        identity = torch.eye(len(features), dtype=features.dtype, device=features.device)
        solved = torch.linalg.solve(features @ features.T + own["log_lambda"].exp() * identity, labels)
        return {"weight": own["scale"] * (features.T @ solved).T, "bias": own["offset"].expand(ways).clone()}


class Projection(nn.Linear):
    """Embeddings, as wide as the features, that are compared with the classes' means of the support set.

    Source: G-Meta (Huang and Zitnik, 2006.07889), section 5 (its prototypes are of N numbers).
    """

    compares = couples_examples = True  # a support example's loss reads the means of all

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, bias=False)  # which cancels out


def build_head(kind: str, dim: int, output_dim: int) -> nn.Module:
    """The head that ``model.head`` names, with PyTorch's own initial values."""
    make = HEADS[kind].load()
    return make(dim, output_dim) if kind == "linear" else make(dim)
