"""Co-learners (phi): the second head, with blocks for each kind of tap.

Each has ``depth`` blocks and an output layer named ``out``; depth 0 is the output layer alone (after pooling).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cml_dist.config.schema import ModelConfig
from cml_dist.nets.conv4 import batch_norm, conv_block
from cml_dist.nets.guard import couples_examples
from cml_dist.registry import BACKBONES


class Colearner(nn.Module):
    """Blocks, pooling, FC.

    Args:
        blocks: applied one after the other to the tap.
        pool: from the last block's output to vectors ``[N, features]``.
        outputs: outputs ``[N, outputs]``.
        called: the blocks' name in canonical parameter names.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        pool: Callable[[Tensor], Tensor],
        features: int,
        outputs: int,
        called: str = "blocks",
    ) -> None:
        super().__init__()
        self.called, self.pool = called, pool
        self.add_module(called, nn.ModuleList(blocks))
        self.out = nn.Linear(features, outputs)

    def forward(self, tap: Tensor) -> Tensor:
        for block in getattr(self, self.called):
            tap = block(tap)
        return self.out(self.pool(tap))


def token_block(in_width: int, out_width: int) -> nn.Module:
    """LayerNorm, Linear, GELU on each token."""
    norm, linear = nn.LayerNorm(in_width), nn.Linear(in_width, out_width)
    return nn.Sequential(OrderedDict(norm=norm, linear=linear, act=nn.GELU()))


class VectorBlock(nn.Linear):
    """Linear, ReLU."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(super().forward(inputs))


def build_colearner(model: ModelConfig, body: nn.Module, outputs: int) -> Colearner:
    """The co-learner for the kind of tap that ``body`` gives: map ``[N, C, H, W]``, tokens ``[N, T, C]`` or vectors.

    Conv-4 and the MLP have the paper's, whose blocks are as wide as the tap: Conv-4's has 82,117 parameters at 84 px,
    5-way, depth 2.

    Source: CML (UAI 2024), section 5 and the authors' code (conv4: the max-pool follows the last block); section 5.1
    (sinusoid: one hidden layer of 40, so depth 1).
    """
    shape, depth = body.tap_shape, model.colearner.depth
    channels = shape[1] if len(shape) == 2 else shape[0]
    width = channels if model.backbone in BACKBONES else model.colearner.width
    sizes = [(channels if number == 0 else width, width) for number in range(depth)]
    features = width if depth else channels
    if model.backbone == "conv4":
        blocks, pool = (conv_block(i, o, batch_norm(o)) for i, o in sizes), nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
        return Colearner(blocks, pool, channels * (shape[1] // 2) * (shape[2] // 2), outputs)
    if len(shape) == 3:
        # A norm that couples examples only where the body already does: else they stay independent. It has a bias of
        # its own: a second one in front of it would have a true gradient of 0.
        norm = batch_norm if couples_examples(body) else _group_norm
        blocks = (conv_block(i, o, norm(o), bias=False) for i, o in sizes)
        return Colearner(blocks, partial(torch.mean, dim=(2, 3)), features, outputs)
    if len(shape) == 2:
        return Colearner((token_block(i, o) for i, o in sizes), partial(torch.mean, dim=1), features, outputs)
    return Colearner((VectorBlock(i, o) for i, o in sizes), nn.Identity(), features, outputs, called="layers")


def _group_norm(channels: int) -> nn.Module:
    """GroupNorm in at most 8 groups of at least 8 channels: it couples no examples, and no group is a lone value."""
    groups = next((count for count in (8, 4, 2) if channels % count == 0 and channels // count >= 8), 1)
    return nn.GroupNorm(groups, channels)
