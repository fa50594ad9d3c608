"""A backbone of the user's own: ``NAME(input_shape, **model.options)``, and what is asked of it before a run starts."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cml_dist.config.schema import ModelConfig
from cml_dist.errors import ModelError
from cml_dist.nets.guard import couples_examples
from cml_dist.types import Features
from cml_dist.user_code import blamed, load, unsealed


def build(model: ModelConfig, input_shape: tuple[int, ...]) -> nn.Module:
    """The body, which knows the shapes of its features: ``tap_shape`` and ``pooled_dim``.

    Raises:
        ConfigError: the code cannot be imported, or fails (with file and line). ModelError: it makes no body.
    """
    make, name = load(model.backbone), f"model.backbone {unsealed(model.backbone)}"
    with blamed(model.backbone, f"fails for inputs of shape {tuple(input_shape)}"):
        body = make(tuple(input_shape), **model.options)
        if not isinstance(body, nn.Module):
            raise ModelError(f"{name} gives {type(body).__name__}", "return a torch.nn.Module")
        inputs = torch.zeros(2, *input_shape).to(next(body.parameters(), torch.zeros(0)))
        with torch.no_grad():
            features = copy.deepcopy(body).eval()(inputs)
    if not isinstance(features, Features):
        raise ModelError(
            f"{name} maps inputs to {type(features).__name__}", "return cml_dist.types.Features(tap, pooled)"
        )
    tap, pooled = tuple(features.tap.shape), tuple(features.pooled.shape)
    if len(pooled) != 2 or len(tap) not in (2, 3, 4) or pooled[0] != 2 or tap[0] != 2:
        raise ModelError(
            f"{name} gives of 2 inputs a tap of shape {tap} and pooled features of shape {pooled}",
            "give pooled [N, D], and a tap [N, D], [N, T, C] or [N, C, H, W]",
        )
    body.tap_shape, body.pooled_dim = tap[1:], pooled[1]
    return body


def check_body(body: nn.Module, name: str, input_shape: tuple[int, ...]) -> None:
    """Whether a prepared body is a function of each example, but for BatchNorm, and leaves its buffers as they are.

    Micro-batches and norms of the support set count on the first, and all gradients on the second.

    Raises:
        ModelError: it is not.
    """
    tried, called = copy.deepcopy(body).double(), f"model.backbone {unsealed(name)}"
    if any(tensor.is_meta for tensor in [*tried.parameters(), *tried.buffers()]):
        return
    before = {n: buffer.clone() for n, buffer in tried.named_buffers()}
    inputs = torch.randn(3, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), blamed(name, "fails in a trial"):
        together, alone = tried(inputs), tried(inputs[:1])
    for buffer, value in tried.named_buffers():
        if not torch.equal(before[buffer], value):
            raise ModelError(f"{called} writes its buffer {buffer}, also in evaluation", "keep no state between calls")
    pairs = ((together.tap, alone.tap), (together.pooled, alone.pooled))
    if not couples_examples(body) and any(not torch.allclose(a[:1], b, rtol=1e-4, atol=1e-6) for a, b in pairs):
        raise ModelError(
            f"{called} gives an example other features in another batch",
            "use LayerNorm, GroupNorm or torch's BatchNorm",
        )
