"""The border of an image that a backbone never sees, where its size is no multiple of its patches."""

from __future__ import annotations

import math

from torch import nn


def watch_stem(model: nn.Module) -> list[tuple[nn.Conv2d, tuple[int, ...], tuple[int, ...]]]:
    """Every convolution that a forward pass will run, in order, with the shapes of its input and output.

    The hooks stay in ``model``.
    """
    ran: list[tuple[nn.Conv2d, tuple[int, ...], tuple[int, ...]]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, i, o: ran.append((conv, tuple(i[0].shape), tuple(o.shape))))
    return ran


def border_warning(
    name: str, image_size: tuple[int, ...], conv: nn.Conv2d, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> str | None:
    """What the first convolution of backbone ``name`` leaves out of images (height, width); None: nothing."""
    if inputs[2:] != image_size:  # the model has padded or scaled them itself
        return None
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    unseen, fitting = [], []
    geometry = zip(image_size, outputs[2:], conv.kernel_size, conv.stride, conv.dilation, padding, strict=True)
    for side, places, kernel, stride, dilation, pad in geometry:
        reach = dilation * (kernel - 1) + 1
        unseen.append(max(0, side - ((places - 1) * stride + reach - pad)))
        smaller = side - (side + 2 * pad - reach) % stride if unseen[-1] else side
        fitting.append((smaller, smaller + stride if unseen[-1] else side))
    if not any(unseen):
        return None
    share = 1 - math.prod(side - lost for side, lost in zip(image_size, unseen, strict=True)) / math.prod(image_size)
    sizes = [f"{width}" if height == width else f"{width}x{height}" for height, width in zip(*fitting, strict=True)]
    return (
        f"model.backbone {name} never sees the last {unseen[0]} rows and {unseen[1]} columns of images of "
        f"{image_size[1]}x{image_size[0]} ({100 * share:.0f} % of the pixels), which it cuts into patches of "
        f"{conv.stride[1]}x{conv.stride[0]}: sizes that fit are {' and '.join(sizes)} (cml-dist data pack --image-size)"
    )
