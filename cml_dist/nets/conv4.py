"""Conv-4: the four-block convolutional backbone of few-shot learning."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cml_dist.errors import ModelError
from cml_dist.nets.blocks import ConvBlock, batch_norm, block_names
from cml_dist.types import Features

NUM_BLOCKS = 4
MIN_SIDE = 2**NUM_BLOCKS


class Conv4(nn.Module):
    """Four times [3x3 conv with bias, BatchNorm, ReLU, 2x2 max-pool].

    ``tap`` is the fourth block's map before its max-pool (``[N, 64, 10, 10]`` at 84 px), ``pooled`` the same map
    max-pooled and flattened (``[N, 1600]`` at 84 px, ``[N, 64]`` at 28 px). Initial values are PyTorch's own.

    Args:
        input_shape: ``(channels, height, width)`` of one image.
        filters: channels of each block.

    Raises:
        ModelError: an image side is below 16 px, so nothing is left after four poolings: use larger images.

    Source: CML (UAI 2024), section 5, "4 x [conv, BN, ReLU, max-pool]".
    """

    def __init__(self, input_shape: tuple[int, int, int], filters: int = 64) -> None:
        super().__init__()
        channels, height, width = input_shape
        if min(height, width) < MIN_SIDE:
            raise ModelError(
                f"images are {height}x{width} px, too small for the four poolings of model.backbone conv4",
                f"use images of at least {MIN_SIDE}x{MIN_SIDE} px, or another model.backbone",
            )
        for number in range(1, NUM_BLOCKS + 1):
            in_channels = channels if number == 1 else filters
            self.add_module(f"block{number}", ConvBlock(in_channels, filters, batch_norm(filters)))
        shrink = 2 ** (NUM_BLOCKS - 1)
        self.tap_shape = (filters, height // shrink, width // shrink)
        self.pooled_dim = filters * (height // MIN_SIDE) * (width // MIN_SIDE)

    def blocks(self) -> list[list[str]]:
        """Names of the parameters of each block, first to last."""
        return block_names(self)

    def forward(self, inputs: Tensor) -> Features:
        """Features of images ``[N, C, H, W]``."""
        maps = self.block1(inputs)
        for block in (self.block2, self.block3, self.block4):
            maps = block(F.max_pool2d(maps, 2))
        return Features(tap=maps, pooled=F.max_pool2d(maps, 2).flatten(1))
