"""Co-learners (phi): the second head, one kind for each kind of tap.

Each has ``depth`` blocks and an output layer named ``out``; depth 0 is the output layer alone (after pooling).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from cml_dist.nets.blocks import ConvBlock

MAX_DEPTH = 4


def _widths(in_width: int, width: int, depth: int) -> list[tuple[int, int]]:
    """(input, output) width of each block; a width above 0 for every depth from 0 to 4."""
    if not 0 <= depth <= MAX_DEPTH:
        raise ValueError(f"co-learner depth is {depth}, not 0 to {MAX_DEPTH}")
    return [(in_width if number == 0 else width, width) for number in range(depth)]


class GridColearner(nn.Module):
    """Conv-4's co-learner: conv blocks, max-pool, flatten, FC; it reads a map ``[N, C, H, W]``.

    At 84 px, 5-way, depth 2 it has 82,117 parameters.

    Args:
        tap_shape: ``(C, H, W)`` of the map.
        depth: conv blocks [3x3 conv with bias, norm, ReLU] of ``C`` channels each.
        output_dim: outputs N.
        norm: makes the norm layer of a block from its channels.

    Source: CML (UAI 2024), section 5 and the authors' code: the max-pool follows the last block.
    """

    def __init__(
        self, tap_shape: tuple[int, int, int], depth: int, output_dim: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        channels, height, width = tap_shape
        self.blocks = nn.ModuleList(ConvBlock(i, o, norm(o)) for i, o in _widths(channels, channels, depth))
        self.out = nn.Linear(channels * (height // 2) * (width // 2), output_dim)

    def forward(self, tap: Tensor) -> Tensor:
        for block in self.blocks:
            tap = block(tap)
        return self.out(F.max_pool2d(tap, 2).flatten(1))


class MapColearner(nn.Module):
    """For the maps of timm backbones: conv blocks, global average pool, FC; it reads ``[N, C, H, W]`` of any size.

    Args:
        channels: channels C of the map.
        depth: conv blocks [3x3 conv, norm, ReLU].
        width: channels of each block.
        output_dim: outputs.
        norm: makes the norm layer of a block from its channels.
    """

    def __init__(
        self, channels: int, depth: int, width: int, output_dim: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        sizes = _widths(channels, width, depth)
        # The norm has a bias of its own: a second one in front of it would have a true gradient of 0.
        self.blocks = nn.ModuleList(ConvBlock(i, o, norm(o), bias=False) for i, o in sizes)
        self.out = nn.Linear(width if depth else channels, output_dim)

    def forward(self, tap: Tensor) -> Tensor:
        for block in self.blocks:
            tap = block(tap)
        return self.out(tap.mean(dim=(2, 3)))


class TokenBlock(nn.Module):
    """LayerNorm, Linear, GELU on each token."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_width)
        self.linear = nn.Linear(in_width, out_width)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.gelu(self.linear(self.norm(tokens)))


class TokenColearner(nn.Module):
    """For the tokens of transformers and mixers: token blocks, mean over tokens, FC; it reads ``[N, T, C]``.

    Args:
        channels: width C of a token.
        depth: blocks [LayerNorm, Linear, GELU].
        width: units of each block.
        output_dim: outputs.
    """

    def __init__(self, channels: int, depth: int, width: int, output_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TokenBlock(i, o) for i, o in _widths(channels, width, depth))
        self.out = nn.Linear(width if depth else channels, output_dim)

    def forward(self, tap: Tensor) -> Tensor:
        for block in self.blocks:
            tap = block(tap)
        return self.out(tap.mean(dim=1))


class VectorColearner(nn.Module):
    """For vectors ``[N, D]``: hidden layers with ReLU, FC.

    Args:
        dim: size D of the vector.
        depth: hidden layers.
        width: units of each hidden layer.
        output_dim: outputs.

    Source: CML (UAI 2024), section 5.1 (sinusoid: one hidden layer of 40, so depth 1).
    """

    def __init__(self, dim: int, depth: int, width: int, output_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in _widths(dim, width, depth))
        self.out = nn.Linear(width if depth else dim, output_dim)

    def forward(self, tap: Tensor) -> Tensor:
        for layer in self.layers:
            tap = F.relu(layer(tap))
        return self.out(tap)
