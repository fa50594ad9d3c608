"""What makes a network fit for second-order meta-gradients, and finds out whether it is.

Three silent faults are met here: running statistics that leak between episodes, caches that keep a value from
other parameters, and operators whose second derivative is missing or wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cml_dist.errors import ModelError
from cml_dist.nets.network import CmlNet
from cml_dist.nets.second_order import WRITTEN_OUT

Norm = Literal["batch", "frozen"]

PROBE_EXAMPLES = 3
NUM_DIRECTIONS = 3
STEPS = {1e-10: 1e-3, 1e-11: 1e-3, 1e-9: 1e-3, 1e-7: 0.05, 1e-6: 0.05}
"""Of the differences, relative to the parameters, with the error that is allowed at each.

So small that hardly ever one of a million ReLUs and max-pools switches between the two sides (at 1e-8 one does, and
its jump drowns the derivative); rounding leaves about 1e-5. The last two are for models that compute a part in float32
whatever they are given (EfficientViT's attention, EvoNorm's variance), where smaller steps drown in rounding.
"""


# --------------------------------------------------------------------------- preparing


class Hardsigmoid(nn.Module):
    """relu6(x + 3) / 6: PyTorch's own hardsigmoid has no second derivative."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu6(inputs + 3.0) / 6.0


def _attention_biases(self: nn.Module, device: torch.device) -> Tensor:
    """LeViT's biases without its cache, which in evaluation mode keeps values of other parameters."""
    return self.attention_biases[:, self.attention_bias_idxs]


def has_batch_norm(net: nn.Module) -> bool:
    """Whether the network has a BatchNorm of any kind."""
    return any(isinstance(module, _BatchNorm) for module in net.modules())


def couples_examples(net: nn.Module) -> bool:
    """Whether an example's output depends on the others of its batch: BatchNorm by batch statistics, or it says so."""
    return any(
        getattr(module, "couples_examples", False)
        or (isinstance(module, _BatchNorm) and (module.training or module.running_mean is None))
        for module in net.modules()
    )


def prepare_for_second_order(net: nn.Module, norm: Norm) -> None:
    """Changes a network, in place, to one that can be differentiated twice and keeps no state between calls.

    Evaluation mode (no dropout, no stochastic depth), activations out of place, attention by its own arithmetic
    instead of a fused kernel, hardsigmoid by its parts, no cached functions of parameters, BatchNorm by policy, and
    faster second derivatives where we have them.

    Args:
        norm: ``"batch"``: BatchNorm uses the statistics of the examples at hand and has no running ones;
            ``"frozen"``: BatchNorm uses its running statistics as constants.

    Raises:
        ModelError: with ``"batch"``, a norm that is no BatchNorm keeps running statistics: use ``"frozen"``.
    """
    net.eval()
    for name, module in net.named_modules():
        module.__class__ = WRITTEN_OUT.get(type(module), type(module))
        if getattr(module, "inplace", False) is True:
            module.inplace = False
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "attention_bias_cache"):
            module.get_attention_biases = MethodType(_attention_biases, module)
        for child_name, child in module.named_children():
            if type(child) is nn.Hardsigmoid:
                setattr(module, child_name, Hardsigmoid())
        if norm == "batch" and isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
        elif norm == "batch" and getattr(module, "running_var", None) is not None:
            raise ModelError(
                f"{type(module).__name__} at {name} keeps running statistics and has no batch mode for evaluation",
                "set model.norm=frozen with pre-trained weights, or choose another model.backbone",
            )


# --------------------------------------------------------------------------- checking


def check_twice_differentiable(
    net: CmlNet, input_shape: tuple[int, ...], output_dim: int, name: str = "the network"
) -> None:
    """Runs one small second-order pass through every learner, and compares it with differences of the gradient.

    The pass uses a stateless copy of the network on the meta device, as meta-training does, in float64.

    Args:
        net: the network, prepared by :func:`prepare_for_second_order`.
        input_shape, output_dim: of one input, and of each learner, without the batch axis.
        name: what messages call the network, e.g. its ``model.backbone``.

    Raises:
        ModelError: the network is no function of its parameters and buffers (it has a cache), or an operator has no
            second derivative or a wrong one: choose another model.backbone (or method.order=1, where only the second
            is at fault).

    Cost: a few first-order passes and one second-order pass on three examples, in float64.
    """
    if net.starts_head and net.colearner is None and not any(True for _ in net.body.parameters()):
        return  # what is trained is behind the features, which are constants
    values = [p.detach().double().flatten() for p in net.parameters()]
    params, scale = torch.cat(values), torch.cat([v.square().mean().sqrt().expand(len(v)) for v in values])
    loss, unused = (_smooth_loss(net, input_shape, output_dim) for _ in range(2))
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(len(params), generator=generator, dtype=params.dtype).to(params.device)

    def gradient(at: Tensor) -> Tensor:
        leaf = at.requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    # Where a ResNet starts its last gain of a block at 0, half of the ReLUs behind it get exactly 0: a kink, at which
    # differences mean nothing. So all move by a tenth.
    params = params + 0.1 * (scale + 0.1) * noise()
    errors = []
    try:
        for _ in range(NUM_DIRECTIONS):
            direction = torch.where(scale > 0, scale, 1.0) * noise()
            # What has no graph (its backward ran outside autograd) counts as zero: the comparison finds it.
            _, exact = torch.autograd.functional.vhp(loss, params, direction)
            if not torch.allclose(loss(params + direction), unused(params + direction), rtol=1e-6):
                raise ModelError(f"{name} keeps values of other parameters", "choose another model.backbone")
            for step, tolerance in STEPS.items():
                ahead, behind = gradient(params + step * direction), gradient(params - step * direction)
                differences = (ahead - behind) / (2 * step)
                errors.append(float((exact - differences).norm() / (differences.norm() or 1.0)))
                if errors[-1] < tolerance:
                    return
    except (RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name} cannot be differentiated twice as a function of its parameters: {reason}",
            "choose another model.backbone, or set method.order=1 (first order)",
        ) from error
    raise ModelError(
        f"the second derivative of {name} is wrong: {min(errors):.1e} of its size off the differences of its gradient",
        "choose another model.backbone, or set method.order=1 (first order)",
    )


def _smooth_loss(net: CmlNet, input_shape: tuple[int, ...], output_dim: int) -> Callable[[Tensor], Tensor]:
    """A smooth loss over all learners on random examples, as a function of all parameters in one float64 vector."""
    stateless = copy.deepcopy(net).to("meta")
    named = dict(net.named_parameters())
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in net.named_buffers()}
    first = "pooled" if net.starts_head else "meta"  # an episode starts the head: it is linear
    learners = (first,) if net.colearner is None else (first, "co")
    generator, device = torch.Generator().manual_seed(1), next(net.parameters()).device
    inputs, targets = (
        torch.randn(PROBE_EXAMPLES, *shape, generator=generator, dtype=torch.float64).to(device)
        for shape in (input_shape, (output_dim,))
    )

    def loss(params: Tensor) -> Tensor:
        pieces = params.split([p.numel() for p in named.values()])
        tensors = {n: piece.view(p.shape) for (n, p), piece in zip(named.items(), pieces, strict=True)}
        outputs = functional_call(stateless, {**tensors, **buffers}, (inputs,), {"learners": learners})
        # Each output is pulled to targets of its own size: embeddings and features are wider than classes.
        pairs = ((output, targets[:, torch.arange(output.shape[1]) % output_dim]) for output in outputs)
        return sum((output - target).square().mean() for output, target in pairs)

    return loss
