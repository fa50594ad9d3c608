"""From what an export says of itself to the network's structure."""

from __future__ import annotations

from typing import Any

import torch

from cml_dist.config.schema import ModelConfig
from cml_dist.errors import ConfigError
from cml_dist.nets.build import build_net
from cml_dist.nets.network import CmlNet
from cml_dist.registry import TIMM, backbone_entry
from cml_dist.types import Params
from cml_dist.user_code import is_code


def described_net(description: dict[str, Any], tensors: Params) -> CmlNet:
    """The network that a description means; its values are to be replaced.

    Args:
        tensors: those that it came with. Whoever made it may have described a network as large as they like.

    Raises:
        ConfigError: it reads nodes of a graph.
        ValueError: it describes far more parameters than there are.
    """
    model = ModelConfig.model_validate(description["model"])
    if backbone_entry(model.backbone).reads == "nodes":
        raise ConfigError(
            f"model.backbone {model.backbone} reads nodes of a graph, which are no examples by themselves",
            "test it on a graph: cml-dist eval RUN_DIR domain.root=FILE",
        )
    shapes = {"input_shape": tuple(description["input_shape"]), "output_dim": description["output_dim"]}
    shapes["warp"] = description.get("warp")
    if backbone_entry(model.backbone) is not TIMM and not is_code(model.backbone):
        with torch.device("meta"):  # measured first, without memory
            size = sum(p.numel() for p in build_net(model, **shapes, seed=0, colearner=False).parameters())
        if size > 2**20 + 2 * sum(value.numel() for value in tensors.values()):
            raise ValueError(f"{size:,} parameters are described")
    return build_net(model, **shapes, seed=0, colearner=False, structure_only=True)
