"""What makes a network fit for second-order meta-gradients, and finds out whether it is.

Three silent faults are met here: running statistics that leak between episodes, caches that keep a value from
other parameters, and operators whose second derivative is missing or wrong.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cml_dist.errors import ModelError
from cml_dist.nets.network import CmlNet
from cml_dist.types import Params

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
        ModelError: an operator has no second derivative, a second derivative is cut off or wrong, a parameter is
            shared under two names, or the network keeps tensors outside its parameters and buffers: choose another
            model.backbone (or method.order=1 where only the second derivative is at fault).

    Cost: a few first-order passes and one second-order pass on three examples, in float64.
    """
    _refuse_shared_parameters(net, name)
    _refuse_stashed_tensors(net, name)
    probe = _Probe(net, input_shape, output_dim, name)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(NUM_DIRECTIONS):
        direction = _relative_direction(probe.params, generator)
        exact = probe.hessian_vector(direction)
        _refuse_stashed_tensors(probe.net, name)
        for step, tolerance in STEPS.items():
            errors.append(_relative_error(exact, probe.difference(direction, step)))
            if errors[-1] < tolerance:
                return
    raise ModelError(
        f"the second derivative of {name} is wrong: {min(errors):.1e} of its size off the differences of its gradient",
        "choose another model.backbone, or set method.order=1 (first order)",
    )


class _Probe:
    """A smooth loss over all learners on random examples, as a function of the parameters."""

    def __init__(self, net: CmlNet, input_shape: tuple[int, ...], output_dim: int, name: str) -> None:
        self.name = name
        self.net = copy.deepcopy(net).to("meta")
        self.buffers = _double(net.named_buffers())
        self.params = _away_from_kinks(_double(net.named_parameters()))
        first = "pooled" if net.starts_head else "meta"  # an episode starts the head: it is linear
        self.learners = (first,) if net.colearner is None else (first, "co")
        generator = torch.Generator().manual_seed(1)
        device = next(net.parameters()).device
        shapes = (PROBE_EXAMPLES, *input_shape), (PROBE_EXAMPLES, output_dim)
        self.inputs, self.targets = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes
        )

    def gradient(self, params: Params) -> Params:
        leaves = _leaves(params)
        return self._grad([self._loss(leaves)], leaves)

    def difference(self, direction: Params, step: float) -> Params:
        ahead = self.gradient({name: value + step * direction[name] for name, value in self.params.items()})
        behind = self.gradient({name: value - step * direction[name] for name, value in self.params.items()})
        return {name: (ahead[name] - behind[name]) / (2 * step) for name in self.params}

    def hessian_vector(self, direction: Params) -> Params:
        leaves = _leaves(self.params)
        grads = self._grad([self._loss(leaves)], leaves, create_graph=True)
        if _meets_error_node(list(grads.values())):
            raise ModelError(
                f"{self.name} cannot be differentiated twice: a custom function in it is marked once_differentiable",
                "choose another model.backbone, or set method.order=1 (first order)",
            )
        # What has no graph (its backward ran outside autograd) is left out here, and found by the comparison.
        used = [name for name, grad in grads.items() if grad.requires_grad]
        if not used:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        return self._grad([grads[name] for name in used], leaves, [direction[name] for name in used])

    def _loss(self, leaves: Params) -> Tensor:
        call = {"learners": self.learners}
        try:
            outputs = functional_call(self.net, {**leaves, **self.buffers}, (self.inputs,), call)
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(
                f"{self.name} cannot run as a function of its parameters and buffers: {_first_line(error)}",
                "choose another model.backbone",
            ) from error
        # Each output is pulled to targets of its own size: embeddings and features are wider than classes.
        targets = (self.targets[:, torch.arange(output.shape[1]) % self.targets.shape[1]] for output in outputs)
        pairs = zip(outputs, targets, strict=True)
        return sum(((output - target).square().mean() for output, target in pairs), torch.zeros(()))

    def _grad(
        self, outputs: list[Tensor], leaves: Params, weights: list[Tensor] | None = None, create_graph: bool = False
    ) -> Params:
        """Gradients by name, zeros for what the outputs do not use; a missing derivative becomes a ModelError."""
        try:
            grads = torch.autograd.grad(
                outputs, list(leaves.values()), weights, create_graph=create_graph, allow_unused=True
            )
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(
                f"{self.name} cannot be differentiated twice: {_cause(error)}",
                "choose another model.backbone, or set method.order=1 (first order)",
            ) from error
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }


def _leaves(params: Params) -> Params:
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def _double(tensors: Iterator[tuple[str, Tensor]]) -> Params:
    return {name: t.detach().to(torch.float64) if t.is_floating_point() else t.detach() for name, t in tensors}


def _cause(error: Exception) -> str:
    operator = re.search(r"derivative for (?:aten::)?(\S+) is not implemented", str(error))
    if operator:
        return f"operator {operator.group(1)} has no second derivative"
    return _first_line(error)


def _meets_error_node(tensors: list[Tensor]) -> bool:
    """Whether the graph has a node that refuses to be differentiated.

    ``torch.autograd.grad`` does not raise there: the node leads to no parameter, so its branch is left out unsaid.
    """
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":
            return True
        following = {upstream for upstream, _ in node.next_functions if upstream is not None} - seen
        seen |= following
        nodes.extend(following)
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _away_from_kinks(params: Params) -> Params:
    """The parameters with a tenth of noise.

    Where a ResNet starts its last gain of a block at 0, half of the ReLUs behind it get exactly 0: a kink, at which
    differences mean nothing.
    """
    generator = torch.Generator().manual_seed(2)
    moved = {}
    for name, value in params.items():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
        moved[name] = value + 0.1 * (_rms(value) + 0.1) * noise
    return moved


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def _relative_direction(params: Params, generator: torch.Generator) -> Params:
    """A random direction in which each parameter tensor moves by its own root mean square (1 where it is zero)."""
    direction = {}
    for name, value in params.items():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        direction[name] = (_rms(value) or 1.0) * noise.to(value.device)
    return direction


def _relative_error(exact: Params, approximate: Params) -> float:
    distance = sum(float((exact[name] - approximate[name]).square().sum()) for name in exact) ** 0.5
    size = sum(float(value.square().sum()) for value in approximate.values()) ** 0.5
    return distance / size if size > 0 else distance


def _refuse_shared_parameters(net: nn.Module, name: str) -> None:
    owners: dict[int, str] = {}
    for module_name, module in net.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full_name = f"{module_name}.{own_name}"
            if id(parameter) in owners:
                raise ModelError(
                    f"{name} shares one parameter under two names, {owners[id(parameter)]} and {full_name}",
                    "choose another model.backbone",
                )
            owners[id(parameter)] = full_name


def _refuse_stashed_tensors(net: nn.Module, name: str) -> None:
    for module_name, module in net.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and _holds_tensor(value):
                raise ModelError(
                    f"{name} keeps a tensor outside its parameters and buffers, {module_name}.{key}",
                    "choose another model.backbone",
                )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item) for item in value)
    return False
