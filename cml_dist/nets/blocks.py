"""The convolution block that Conv-4 and the co-learners share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def batch_norm(channels: int) -> nn.Module:
    """BatchNorm by the statistics of the examples at hand; it has no running statistics (transductive, as in CML)."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


def group_norm(channels: int) -> nn.Module:
    """GroupNorm in at most 8 groups of at least 8 channels: it couples no examples, and no group is a lone value."""
    groups = next((count for count in (8, 4, 2) if channels % count == 0 and channels // count >= 8), 1)
    return nn.GroupNorm(groups, channels)


def block_names(net: nn.Module) -> list[list[str]]:
    """Names of the parameters of each of a module's children, in order."""
    return [[f"{child}.{name}" for name, _ in module.named_parameters()] for child, module in net.named_children()]


class ConvBlock(nn.Module):
    """3x3 convolution (same size), norm, ReLU.

    Args:
        in_channels: channels of the input map ``[N, in_channels, H, W]``.
        out_channels: channels of the output map ``[N, out_channels, H, W]``.
        norm: the norm layer after the convolution; its bias is what ``bias`` would double.
        bias: whether the convolution has a bias (Conv-4 of the paper has one).
    """

    def __init__(self, in_channels: int, out_channels: int, norm: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
        self.norm = norm

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(maps)))
