"""What makes a network fit for second-order meta-gradients, and finds out whether it is.

Three silent faults are met here: running statistics that leak between episodes, caches that keep a value from
other parameters, and operators whose second derivative is missing or wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cml_dist.errors import ModelError
from cml_dist.nets.network import CmlNet

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
    """Whether an example's output depends on the other examples of its batch (BatchNorm by batch statistics)."""
    return any(
        isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        for module in net.modules()
    )


def prepare_for_second_order(net: nn.Module, norm: Norm) -> None:
    """Changes a network, in place, to one that can be differentiated twice and keeps no state between calls.

    Evaluation mode (no dropout, no stochastic depth), activations out of place, attention by its own arithmetic
    instead of a fused kernel, hardsigmoid by its parts, no cached functions of parameters, and BatchNorm by policy.

    Args:
        net: the network.
        norm: ``"batch"``: BatchNorm uses the statistics of the examples at hand and has no running ones;
            ``"frozen"``: BatchNorm uses its running statistics as constants.

    Raises:
        ModelError: with ``"batch"``, a norm that is no BatchNorm keeps running statistics: use ``"frozen"``.
    """
    net.eval()
    for name, module in net.named_modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "attention_bias_cache"):
            module.get_attention_biases = MethodType(_attention_biases, module)
        for child_name, child in module.named_children():
            if type(child) is nn.Hardsigmoid:
                setattr(module, child_name, Hardsigmoid())
        if norm == "batch":
            _use_batch_statistics(name, module)


def _use_batch_statistics(name: str, module: nn.Module) -> None:
    if isinstance(module, _BatchNorm):
        module.running_mean = None
        module.running_var = None
        module.num_batches_tracked = None
        module.track_running_stats = False
    elif getattr(module, "running_var", None) is not None:
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
        input_shape: shape of one input, without the batch axis.
        output_dim: outputs of each learner.
        name: what messages call the network, e.g. its ``model.backbone``.

    Raises:
        ModelError: the network is no function of its parameters and buffers (it has a cache), or an operator has no
            second derivative or a wrong one: choose another model.backbone (or method.order=1, where only the second
            is at fault).

    Cost: a few first-order passes and one second-order pass on three examples, in float64.
    """
    loss, params = _probe(net, input_shape, output_dim)
    unused, _ = _probe(net, input_shape, output_dim)
    generator = torch.Generator().manual_seed(0)
    errors = []
    try:
        for _ in range(NUM_DIRECTIONS):
            # Each parameter tensor moves by its own root mean square (1 where it is zero).
            direction = _noise(params, generator, lambda rms: rms or 1.0)
            # What has no graph (its backward ran outside autograd) counts as zero: the comparison finds it.
            _, exact = torch.autograd.functional.vhp(loss, params, direction)
            moved = [p + d for p, d in zip(params, direction, strict=True)]
            if not torch.allclose(loss(*moved), unused(*moved), rtol=1e-6):
                raise ModelError(f"{name} keeps values of other parameters", "choose another model.backbone")
            for step, tolerance in STEPS.items():
                ahead, behind = (_gradient(loss, params, direction, sign * step) for sign in (1, -1))
                differences = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
                distance = _norm([a - b for a, b in zip(exact, differences, strict=True)])
                errors.append(distance / (_norm(differences) or 1.0))
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


Values = tuple[Tensor, ...]


def _probe(net: CmlNet, input_shape: tuple[int, ...], output_dim: int) -> tuple[Callable[..., Tensor], Values]:
    """A smooth loss over all learners on random examples, as a function of parameters; and parameters in float64."""
    stateless = copy.deepcopy(net).to("meta")
    names = [name for name, _ in net.named_parameters()]
    params = tuple(p.detach().double() for p in net.parameters())
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in net.named_buffers()}
    first = "pooled" if net.starts_head else "meta"  # an episode starts the head: it is linear
    learners = (first,) if net.colearner is None else (first, "co")
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (
        torch.randn(PROBE_EXAMPLES, *shape, generator=generator, dtype=torch.float64).to(params[0].device)
        for shape in (input_shape, (output_dim,))
    )

    def loss(*values: Tensor) -> Tensor:
        tensors = {**dict(zip(names, values, strict=True)), **buffers}
        outputs = functional_call(stateless, tensors, (inputs,), {"learners": learners})
        # Each output is pulled to targets of its own size: embeddings and features are wider than classes.
        pairs = ((output, targets[:, torch.arange(output.shape[1]) % output_dim]) for output in outputs)
        return sum((output - target).square().mean() for output, target in pairs)

    # Where a ResNet starts its last gain of a block at 0, half of the ReLUs behind it get exactly 0: a kink, at which
    # differences mean nothing. So all move by a tenth.
    away = _noise(params, torch.Generator().manual_seed(2), lambda rms: 0.1 * (rms + 0.1))
    return loss, tuple(value + noise for value, noise in zip(params, away, strict=True))


def _gradient(loss: Callable[..., Tensor], params: Values, direction: Values, step: float) -> Values:
    leaves = [(p + step * d).requires_grad_() for p, d in zip(params, direction, strict=True)]
    return torch.autograd.grad(loss(*leaves), leaves, allow_unused=True, materialize_grads=True)


def _noise(params: Values, generator: torch.Generator, size: Callable[[float], float]) -> Values:
    """Gaussian noise for each parameter, scaled by a function of its root mean square."""
    drawn = (torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in params)
    return tuple(size(float(p.square().mean().sqrt())) * noise for p, noise in zip(params, drawn, strict=True))


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5
