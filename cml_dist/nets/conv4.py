"""Conv-4, the four-block convolutional backbone of few-shot learning, and the block that co-learners share with it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from cml_dist.config.schema import ModelConfig
from cml_dist.errors import ModelError
from cml_dist.nets.second_order import BatchNorm2d, Conv2d, max_pool
from cml_dist.nets.warp import warped
from cml_dist.types import Features

NUM_BLOCKS = 4
MIN_SIDE = 2**NUM_BLOCKS


def batch_norm(channels: int) -> nn.Module:
    """BatchNorm by the statistics of the examples at hand; it has no running statistics (transductive, as in CML)."""
    return BatchNorm2d(channels, track_running_stats=False)


class UnaddedBias(Conv2d):
    """A convolution whose bias is a parameter (Conv-4 of the paper has one), but is not added.

    A batch norm behind it takes any bias out again. So the function is the same, and the bias's gradient is 0: exactly,
    and not the 1e-8 of noise that Adam blows up to the learning rate.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        return self.convolved(inputs, None)


def conv_block(in_channels: int, out_channels: int, norm: nn.Module, bias: bool = True) -> nn.Module:
    """3x3 convolution (same size), norm, ReLU: maps ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``.

    Args:
        norm: with ``bias``, one by batch statistics.
        bias: whether the convolution has a bias; the norm's own is what it doubles.
    """
    conv = (UnaddedBias if bias else Conv2d)(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
    return nn.Sequential(OrderedDict(conv=conv, norm=norm, act=nn.ReLU()))


class Conv4(nn.Module):
    """Four times [3x3 conv with bias, BatchNorm, ReLU, 2x2 max-pool]; more blocks may precede the last max-pool.

    Max-pool and ReLU commute, in value and gradient: the pool comes first, and leaves the ReLU a quarter of the work.
    On a CPU the maps lie in memory channels last: first convolution, batch norm and max-pool are faster then.

    ``tap`` is the last block's map before the max-pool (``[N, 64, 10, 10]`` at 84 px), ``pooled`` the same map
    max-pooled and flattened (``[N, 1600]`` at 84 px, ``[N, 64]`` at 28 px). Initial values are PyTorch's own.

    Args:
        input_shape: ``(channels, height, width)`` of one image.
        filters: channels of each block.
        extra_blocks: how many more; they keep the map's size, so that head and co-learner stay as they are.

    Raises:
        ModelError: an image side is below 16 px, so nothing is left after four poolings: use larger images.

    Source: CML (UAI 2024), section 5, "4 x [conv, BN, ReLU, max-pool]".
    """

    def __init__(self, input_shape: tuple[int, int, int], filters: int = 64, extra_blocks: int = 0) -> None:
        super().__init__()
        channels, height, width = input_shape
        if min(height, width) < MIN_SIDE:
            raise ModelError(
                f"images are {width}x{height} px, too small for the four poolings of model.backbone conv4",
                f"use images of at least {MIN_SIDE}x{MIN_SIDE} px, or another model.backbone",
            )
        self.num_blocks = NUM_BLOCKS + extra_blocks
        for number in range(1, self.num_blocks + 1):
            in_channels = channels if number == 1 else filters
            self.add_module(f"block{number}", conv_block(in_channels, filters, batch_norm(filters)))
        shrink = 2 ** (NUM_BLOCKS - 1)
        self.tap_shape = (filters, height // shrink, width // shrink)
        self.pooled_dim = filters * (height // MIN_SIDE) * (width // MIN_SIDE)

    def blocks(self) -> list[list[str]]:
        """Names of the parameters of each block, first to last."""
        return [[f"{child}.{name}" for name, _ in block.named_parameters()] for child, block in self.named_children()]

    def channel_groups(self) -> list[list[str]]:
        """Names of the tensors whose first axis is the same channels, a list a block, its weight first."""
        return [
            [f"{block}.{layer}.{kind}" for layer in ("conv", "norm") for kind in ("weight", "bias")]
            for block, _ in self.named_children()
        ]

    def warp_places(self) -> list[tuple[nn.Module, int]]:
        """Behind each block: the module that owns the warp layer, and its channels."""
        return [(block, self.tap_shape[0]) for block in self.children()]

    def forward(self, inputs: Tensor) -> Features:
        """Features of images ``[N, C, H, W]``."""
        # A clone, since ``to`` leaves images of one channel as they lie: their maps would not lie channels last.
        maps = inputs.clone(memory_format=torch.channels_last) if inputs.device.type == "cpu" else inputs
        for number, block in enumerate(self.children(), start=1):
            maps = block.norm(block.conv(maps))
            if number < NUM_BLOCKS:
                maps = warped(block, block.act(max_pool(maps)))
            elif number < self.num_blocks:
                maps = warped(block, block.act(maps))
        return Features(tap=block.act(maps), pooled=warped(block, block.act(max_pool(maps))).flatten(1))


def build(model: ModelConfig, input_shape: tuple[int, ...]) -> Conv4:
    return Conv4(input_shape, model.filters, model.extra_blocks)
