"""ResNet-12, the residual network of few-shot learning, as two of timm's models: resnet12 and resnet12_wide."""

from __future__ import annotations

from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn

from cml_dist.nets.warp import warped

CONFIG = {"input_size": (3, 84, 84), "first_conv": ("layer1.0.conv1", "layer1.0.downsample.0"), "classifier": "head.fc"}
default_cfgs = generate_default_cfgs({"resnet12": CONFIG, "resnet12_wide": CONFIG})


class Block(nn.Module):
    """Max-pool (where ``pool``), three times [3x3 conv, BatchNorm], a 1x1 shortcut: [N, inputs, H, W] to outputs."""

    def __init__(self, inputs: int, outputs: int, pool: bool) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        for number in (1, 2, 3):
            width = inputs if number == 1 else outputs
            self.add_module(f"conv{number}", nn.Conv2d(width, outputs, 3, padding=1, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.act = nn.LeakyReLU(0.1)

    def forward(self, maps: Tensor) -> Tensor:
        maps = warped(self, self.pool(maps))
        out = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(maps))))))
        return self.act(self.bn3(self.conv3(out)) + self.downsample(maps))


class ResNet12(nn.Module):
    """Four blocks of ``widths`` channels, each followed by a 2x2 max-pool; global pool; classifier. No DropBlock.

    ``forward_features`` gives the fourth block's map before its max-pool: [N, 512, 4, 4] at 32 px, [N, 512, 10, 10] at
    84 px. Parameters are named as in the code of FEAT and RFS, whose encoders' weights fit ``resnet12_wide``.

    Source: TADAM (Oreshkin et al., 1805.10123), section 4; initial values as in FEAT's code (Kaiming, fan-out).
    """

    def __init__(
        self, widths: tuple[int, ...], num_classes: int, in_chans: int, global_pool: str = "avg", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, widths[-1], widths[-1]
        for number, outputs in enumerate(widths):
            block = Block(widths[number - 1] if number else in_chans, outputs, pool=number > 0)
            self.add_module(f"layer{number + 1}", nn.Sequential(block))
        self.pool = nn.MaxPool2d(2)
        levels = zip((*widths, widths[-1]), ("layer1", "layer2", "layer3", "layer4", "pool"), strict=True)
        self.feature_info = [{"num_chs": c, "reduction": 2**k, "module": name} for k, (c, name) in enumerate(levels)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
        self.head = ClassifierHead(widths[-1], num_classes, global_pool, drop_rate)

    def group_matcher(self, coarse: bool = False) -> dict[str, list[tuple[str, tuple[int] | None]]]:
        # The last warp layer is of the network itself, and belongs to the block before it.
        return {"blocks": [(r"^layer(\d+)", None), (r"^warp", MATCH_PREV_GROUP)]}

    def channel_groups(self) -> list[list[str]]:
        """Names of the tensors whose first axis is the same channels, a list a layer, its weight first."""
        layers = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3", "downsample.0", "downsample.1"))
        return [
            [f"{block}.0.{name}.{kind}" for name in together for kind in ("weight", "bias")]
            for block in ("layer1", "layer2", "layer3", "layer4")
            for together in layers
        ]

    def warp_places(self) -> list[tuple[nn.Module, int]]:
        """Behind each block's max-pool: the module that owns the warp layer, and its channels."""
        widths = [info["num_chs"] for info in self.feature_info[:-1]]
        owners = (self.layer2[0], self.layer3[0], self.layer4[0], self)
        return list(zip(owners, widths, strict=True))

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < 16:
            raise ValueError("its four max-pools need at least 16x16 px")
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(warped(self, self.pool(x)), pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def resnet12(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """ResNet-12 as in TADAM and BOIL: 7,996,800 parameters without classifier."""
    return build_model_with_cfg(ResNet12, "resnet12", pretrained, **{"widths": (64, 128, 256, 512), **kwargs})


@register_model
def resnet12_wide(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """ResNet-12 as in FEAT and RFS: 12,424,320 parameters without classifier."""
    return build_model_with_cfg(ResNet12, "resnet12_wide", pretrained, **{"widths": (64, 160, 320, 640), **kwargs})
