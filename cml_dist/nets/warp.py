"""Warp layers: between the layers of a body, as wide as these, and the identity at the start.

They are called ``warp`` in the module behind which they stand, so that ``*.warp.*`` are their parameters' names.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cml_dist.errors import ConfigError
from cml_dist.nets.second_order import Conv2d


class LinearWarp(nn.Linear):
    """W x, or with ``residual`` x + W x, on the channels of maps ``[N, C, H, W]`` or vectors ``[N, C]``; no bias."""

    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__(channels, channels, bias=False)
        self.residual = residual
        with torch.no_grad():
            self.weight.zero_() if residual else nn.init.eye_(self.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        last = inputs if inputs.ndim == 2 else inputs.movedim(1, -1)
        out = super().forward(last)
        out = out if inputs.ndim == 2 else out.movedim(-1, 1)
        return inputs + out if self.residual else out


class ConvWarp(Conv2d):
    """The same by a 3x3 convolution, on maps."""

    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)
        self.residual = residual
        with torch.no_grad():
            self.weight.zero_() if residual else nn.init.dirac_(self.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        out = super().forward(inputs)
        return inputs + out if self.residual else out


def add_warps(body: nn.Module, backbone: str, kind: Literal["linear", "conv"], residual: bool) -> None:
    """Put a warp layer at each of the body's ``warp_places()``, in place; the body stays the same function.

    Raises:
        ConfigError: the body has no such places.
    """
    places = body.warp_places() if hasattr(body, "warp_places") else []
    if not places:
        raise ConfigError(
            f"method.warp is {kind}, but model.backbone {backbone} has no places for warp layers",
            "set model.backbone=conv4, resnet12 or mlp, or another method.name",
        )
    on_maps = len(body.tap_shape) == 3
    for owner, channels in places:
        owner.warp = (ConvWarp if kind == "conv" and on_maps else LinearWarp)(channels, residual)


def warped(owner: nn.Module, features: Tensor) -> Tensor:
    """``features`` through the warp layer of ``owner``, if it has one."""
    return owner.warp(features) if hasattr(owner, "warp") else features
