"""Parts of a network by name: which parameters adapt in the inner loop, and which are meta-trained at all."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from cml_dist.errors import ConfigError
from cml_dist.methods.maml_pp import ROWS
from cml_dist.methods.warpgrad import is_warp
from cml_dist.nets.network import CmlNet
from cml_dist.types import BODY, COLEARNER, HEAD, RULE

WORDS = "body, head, norms, biases, last:N"


def select(net: CmlNet, terms: Sequence[str], key: str, *, adapting: bool = False) -> list[str]:
    """Canonical names that a list of terms selects, in the network's own order.

    Args:
        net: the network.
        terms: each ``body``, ``head``, ``norms``, ``biases``, ``last:N`` (the last N blocks of the body, with what
            follows them) or a glob over canonical names, e.g. ``body.model.blocks.1?.*``. The co-learner is never
            selected.
        key: the setting that holds the terms, for messages.
        adapting: of what may adapt in the inner loop (:meth:`CmlNet.adaptable`), instead of all meta-parameters.

    Raises:
        ConfigError: a term that selects nothing, with the nearest names; or more blocks than there are.
    """
    own = net.adaptable() if adapting else dict(net.named_parameters())
    names = [n for n in own if not n.startswith((f"{COLEARNER}.", f"{RULE}."))]
    chosen: set[str] = set()
    for term in terms:
        found = _found(net, names, term, key)
        if not found and not (term == HEAD and not adapting):  # a head may have no parameters of its own
            near = difflib.get_close_matches(term, [BODY, HEAD, *names], n=3, cutoff=0.3)
            words = f"{WORDS}{', lora:RANK' * adapting} or a glob over names"
            raise ConfigError(
                f"{key} has {term!r}, which selects no parameter of the network",
                f"use {words} such as {', '.join(near or names[:3])}",
            )
        chosen.update(found)
    return [n for n in names if n in chosen]


def _found(net: CmlNet, names: list[str], term: str, key: str) -> list[str]:
    if term in (BODY, HEAD):
        return [n for n in names if n.startswith(f"{term}.")]
    if term == "norms":  # by the class's name: timm has norms of its own
        owners = {name for name, module in net.named_modules() if "Norm" in type(module).__name__}
        return [n for n in names if n.rpartition(".")[0] in owners]
    if term == "biases":
        return [n for n in names if n.endswith("bias")]
    last = re.fullmatch(r"last:(\d+)", term)
    if last is None:
        return [n for n in names if fnmatchcase(n, term)]
    if not hasattr(net.body, "blocks"):
        raise ConfigError(f"{key} has {term}, but the body has no method blocks", "add it, or use globs over names")
    blocks, count = net.body.blocks(), int(last.group(1))
    if not 1 <= count <= len(blocks):
        raise ConfigError(
            f"{key} has {term}, but the body has {len(blocks)} blocks", f"use last:1 to last:{len(blocks)}"
        )
    wanted = {f"{BODY}.{n}" for block in blocks[-count:] for n in block}
    return [n for n in names if n in wanted]  # without what is frozen, and no parameter


def linear_weights(net: CmlNet) -> tuple[tuple[str, int, int], ...]:
    """Name, outputs and inputs of each linear layer's weight in the body, frozen ones too.

    Raises:
        ConfigError: there is none.
    """
    layers = [(n, m) for n, m in net.body.named_modules(prefix=BODY) if isinstance(m, nn.Linear)]
    if not layers:
        raise ConfigError(
            "method.adapts has lora, but the body has no linear layers", "choose a transformer, or use last:N or norms"
        )
    return tuple((f"{name}.weight", layer.out_features, layer.in_features) for name, layer in layers)


def layers_of(net: CmlNet) -> tuple[tuple[str], ...]:
    """The weight of each linear layer and convolution of the body but warp layers, each a group of its own."""
    layers = ((n, m) for n, m in net.body.named_modules(prefix=BODY) if isinstance(m, (nn.Linear, _ConvNd)))
    return tuple((f"{n}.weight",) for n, _ in layers if not is_warp(f"{n}.weight"))


def channels_of(net: CmlNet, backbone: str) -> tuple[tuple[str, ...], ...]:
    """Names of the body's tensors whose first axis is the same channels, a group a layer, its weight first.

    Raises:
        ConfigError: the body does not say.
    """
    channels = getattr(net.body, "channel_groups", lambda: None)()
    if channels is None:
        raise ConfigError(
            f"method.augment_pruning is width, but model.backbone {backbone} does not say what its channels are",
            "set method.augment_pruning=parameters or catfish, or model.backbone=conv4, resnet12, mlp or gcn",
        )
    return tuple(tuple(f"{BODY}.{n}" for n in group) for group in channels)


def freeze(net: CmlNet, trained: Sequence[str], *, colearner: bool = False) -> None:
    """Make constants (buffers) of all parameters of body and head but those in ``trained``, in place.

    Args:
        colearner: of the co-learner too, which then stays as it was initialised.

    A constant has no gradient, no optimizer state and no fast weight; what lies below every parameter that is left
    builds no graph.
    """
    names = [n for n, _ in net.named_parameters() if n not in trained]
    net.make_constant(n for n in names if colearner or not n.startswith(f"{COLEARNER}."))


def norms_a_step(net: CmlNet) -> tuple[str, ...]:
    """Gains and biases of the body's BatchNorms that are trained, also where rows a step stand in their place."""
    named = dict(net.named_parameters())
    modules = ((n, m) for n, m in net.named_modules() if n.startswith(f"{BODY}.") and isinstance(m, _BatchNorm))
    names = [f"{module}.{kind}" for module, _ in modules for kind in ("weight", "bias")]
    return tuple(n for n in names if n in named or f"{ROWS}{n}" in named)
