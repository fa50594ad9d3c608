"""From the model's settings to the network, with initial values that are a pure function of the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from cml_dist.config.schema import ModelConfig
from cml_dist.errors import ConfigError
from cml_dist.nets.blocks import batch_norm, group_norm
from cml_dist.nets.colearner import GridColearner, MapColearner, TokenColearner, VectorColearner
from cml_dist.nets.conv4 import Conv4
from cml_dist.nets.guard import couples_examples, has_batch_norm, prepare_for_second_order
from cml_dist.nets.heads import build_head
from cml_dist.nets.mlp import MLP
from cml_dist.nets.network import CmlNet
from cml_dist.types import BODY, COLEARNER, HEAD

PARTS = (BODY, HEAD, COLEARNER)


def build_net(
    model: ModelConfig,
    *,
    input_shape: tuple[int, ...],
    output_dim: int,
    seed: int,
    colearner: bool,
    prototypes: bool = False,
    structure_only: bool = False,
) -> CmlNet:
    """The network, ready for second-order meta-gradients, on the CPU in float32.

    Args:
        model: the settings.
        input_shape: shape of one input: ``(C, H, W)`` of an image, or ``(D,)`` of a vector.
        output_dim: outputs of each learner (ways, or regression targets).
        seed: chooses the initial values; each part has a stream of its own, so the co-learner's settings change
            neither body nor head. The global random state is left as it was.
        colearner: whether to build the co-learner.
        prototypes: the co-learner gives embeddings of ``model.colearner.width`` numbers instead of outputs.
        structure_only: all values will be replaced (an exported model's): no pre-trained weights are read or needed.

    Raises:
        ConfigError: the backbone does not read such inputs, or ``model.norm=frozen`` has no statistics to freeze.
        ModelError: the backbone is unknown, or does not take the image size or channels.
    """
    _check_inputs(model, input_shape)
    with _part_seed(seed, BODY):
        body = _build_body(model.model_copy(update={"pretrained": False}) if structure_only else model, input_shape)
    if model.norm == "frozen" and has_batch_norm(body) and not (model.pretrained or structure_only):
        raise ConfigError(
            f"model.norm is frozen, but model.backbone {model.backbone} has no pre-trained statistics to freeze",
            "set model.norm=batch, or model.pretrained to true or a weight file (timm backbones)",
        )
    prepare_for_second_order(body, model.norm)
    with _part_seed(seed, HEAD):
        head = build_head(model.head, body.pooled_dim, output_dim)
    second = None
    if colearner:
        with _part_seed(seed, COLEARNER):
            second = _build_colearner(model, body, model.colearner.width if prototypes else output_dim)
    net = CmlNet(body, head, second, prototypes=prototypes and colearner)
    prepare_for_second_order(net, model.norm)
    return net


@contextmanager
def _part_seed(seed: int, part: str) -> Iterator[None]:
    """A random stream for one part; only the CPU's generator is touched, and it is put back."""
    state = np.random.SeedSequence([seed, PARTS.index(part)]).generate_state(2, np.uint32)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(state[0]) << 32 | int(state[1]))
        yield


def _check_inputs(model: ModelConfig, input_shape: tuple[int, ...]) -> None:
    reads_vectors = model.backbone == "mlp"
    if len(input_shape) != (1 if reads_vectors else 3):
        kind, remedy = ("vectors", "conv4 or a timm model") if reads_vectors else ("images (C, H, W)", "mlp")
        raise ConfigError(
            f"model.backbone {model.backbone} reads {kind}, but the domain's inputs have shape {tuple(input_shape)}",
            f"set model.backbone to {remedy}, or choose another domain",
        )
    if model.pretrained and model.backbone in ("conv4", "mlp"):
        raise ConfigError(
            f"model.pretrained is {model.pretrained}, but model.backbone {model.backbone} has no pre-trained weights",
            "set model.pretrained=false, or choose a timm backbone",
        )


def _build_body(model: ModelConfig, input_shape: tuple[int, ...]) -> nn.Module:
    if model.backbone == "conv4":
        return Conv4(input_shape, model.filters)
    if model.backbone == "mlp":
        return MLP(input_shape[0], model.hidden)
    # timm takes seconds to import, and the other backbones do not need it.
    from cml_dist.nets.timm_backbone import TimmBackbone

    return TimmBackbone(model.backbone, input_shape, model.pretrained)


def _build_colearner(model: ModelConfig, body: nn.Module, output_dim: int) -> nn.Module:
    """The co-learner for the body's kind of tap."""
    depth, width, shape = model.colearner.depth, model.colearner.width, body.tap_shape
    if model.backbone == "conv4":
        return GridColearner(shape, depth, output_dim, batch_norm)
    if model.backbone == "mlp":
        return VectorColearner(shape[0], depth, shape[0], output_dim)
    if len(shape) == 3:
        # A norm that couples examples only where the body already does: else they stay independent.
        norm: Callable[[int], nn.Module] = batch_norm if couples_examples(body) else group_norm
        return MapColearner(shape[0], depth, width, output_dim, norm)
    if len(shape) == 2:
        return TokenColearner(shape[1], depth, width, output_dim)
    return VectorColearner(shape[0], depth, width, output_dim)
