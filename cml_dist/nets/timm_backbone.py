"""Any timm model as a backbone, and the way back to plain timm. The only importer of timm."""

from __future__ import annotations

import copy
import difflib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name
from timm.layers import config as timm_config
from timm.models import load_pretrained, load_state_dict
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.func import functional_call

from cml_dist.errors import ConfigError, ModelError
from cml_dist.nets.guard import couples_examples, prepare_for_second_order
from cml_dist.nets.network import CmlNet
from cml_dist.types import BODY, Features, Params

HUB_TIMEOUT_S = 10.0

PREFIX = f"{BODY}.model."
"""Canonical names of the backbone's parameters are this, and then timm's own names."""


@dataclass
class _TimmBuffers:
    """timm's own buffers (running statistics) as they were built or loaded: for export only, no forward reads them."""

    by_name: dict[str, Tensor] = field(default_factory=dict)


class TimmBackbone(nn.Module):
    """A timm model without its classifier.

    ``tap`` is what ``forward_features`` gives: a map ``[N, C, H, W]`` or tokens ``[N, T, C]``; for the few models
    that give several (coat, crossvit, efficientvim) it is ``pooled``. ``pooled`` is ``forward_head(pre_logits=True)``.

    Args:
        name: the model's name in timm, e.g. ``"resnet18"`` or ``"vit_tiny_patch16_224.augreg_in21k"``.
        input_shape: ``(channels, height, width)`` of one image.
        pretrained: True for the published weights, or the path of a local weight file (safetensors or .pth).

    Raises:
        ModelError: timm has no such model, the model refuses the image size or channels, or the weights do not fit.
        ConfigError: pre-trained weights were asked for where there are none.
    """

    def __init__(self, name: str, input_shape: tuple[int, int, int], pretrained: bool | str = False) -> None:
        super().__init__()
        self.name = name
        self.input_shape = tuple(input_shape)
        self.create_kwargs = _create_kwargs(name, input_shape)
        self.model = _create(name, pretrained, num_classes=0, **self.create_kwargs)
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        self.initial_buffers = _TimmBuffers({key: value.clone() for key, value in self.model.named_buffers()})
        self.tap_shape, self.pooled_dim = self._probe(input_shape)

    def blocks(self) -> list[list[str]]:
        """Names of the parameters of each block, first to last, as timm groups them (the stem is the first).

        Raises:
            ConfigError: this model does not say how it is divided.
        """
        try:
            # With the buffers: a frozen block is still a block.
            tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
            groups = group_with_matcher(tensors, self.model.group_matcher(coarse=False))
        except (AttributeError, NotImplementedError) as error:
            raise ConfigError(
                f"model.backbone {self.name} does not say what its blocks are", "use globs over names instead of last:N"
            ) from error
        return [[f"model.{name}" for name in names] for names in groups.values()]

    def forward(self, inputs: Tensor) -> Features:
        """Features of images ``[N, C, H, W]``."""
        features = self.model.forward_features(inputs)
        pooled = self.model.forward_head(features, pre_logits=True)
        if not isinstance(features, Tensor):
            return Features(tap=pooled, pooled=pooled)
        tap = features.permute(0, 3, 1, 2) if self.channels_last and features.ndim == 4 else features
        return Features(tap=tap, pooled=pooled)

    def _probe(self, input_shape: tuple[int, int, int]) -> tuple[tuple[int, ...], int]:
        """Shapes of tap and pooled without the batch axis, by a forward pass that computes nothing."""
        stateless = copy.deepcopy(self.model).to("meta").eval()
        probe = copy.copy(self)
        probe._modules = {"model": stateless}
        try:
            with torch.no_grad():
                features = probe(torch.empty(2, *input_shape, device="meta"))
        except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
            made_for = "x".join(map(str, self.model.pretrained_cfg.get("input_size") or ())) or "other images"
            raise ModelError(
                f"model.backbone {self.name} cannot take images of {'x'.join(map(str, input_shape))}: {_reason(error)}",
                f"use images it can take (it was made for {made_for}), or another model.backbone",
            ) from error
        return tuple(features.tap.shape[1:]), features.pooled.shape[1]


# --------------------------------------------------------------------------- building


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Fused attention has no second derivative; the switch is timm's global, so it is put back."""
    before = timm_config._USE_FUSED_ATTN
    timm.layers.set_fused_attn(False)
    try:
        yield
    finally:
        timm_config._USE_FUSED_ATTN = before


def _create_kwargs(name: str, input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What ``timm.create_model`` must be told about the images."""
    if not timm.is_model(name):
        known = timm.list_models()
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        hint = f"use one of the nearest names: {', '.join(near)}" if near else "timm.list_models() has the names"
        raise ModelError(f"model.backbone {name!r} is neither conv4, mlp nor one of timm's {len(known)} models", hint)
    channels, height, width = input_shape
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    kwargs: dict[str, Any] = {"in_chans": channels}
    if config is not None and config.fixed_input_size:
        kwargs["img_size"] = (height, width)
    return kwargs


def _create(name: str, pretrained: bool | str, **kwargs: Any) -> nn.Module:
    from_hub = pretrained is True
    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if from_hub and not getattr(published, "has_weights", None):
        raise ConfigError(
            f"model.pretrained is true, but timm has no published weights for {name}",
            "set model.pretrained=false, or to the path of a local weight file",
        )
    try:
        if from_hub and published.hf_hub_id:
            _reach_hub(published.hf_hub_id.partition("@")[0])
        with _without_fused_attention():
            model = timm.create_model(name, pretrained=from_hub, **kwargs)
    except Exception as error:  # timm and its download clients raise of every kind
        if from_hub:
            raise ModelError(
                f"the published weights of {name} cannot be had: {_reason(error)}",
                "check the network, or set model.pretrained to a local weight file or false",
            ) from error
        raise ModelError(
            f"timm cannot build model.backbone {name} with {kwargs}: {_reason(error)}",
            "use images it can take, or another model.backbone",
        ) from error
    if isinstance(pretrained, str):
        _load_file(model, name, pretrained, kwargs["in_chans"])
    return model


def _reach_hub(repo: str) -> None:
    """Ask the hub once, and fail soon: its client would try each file six times, and say so. What is cached needs none.

    Raises:
        Exception: of any kind, where the hub is not there or has no such weights.
    """
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "snapshots")
    if not any(cached.glob("*/*")):
        HfApi().model_info(repo, timeout=HUB_TIMEOUT_S)


def _load_file(model: nn.Module, name: str, path: str, channels: int) -> None:
    """Loads a local weight file into a model without classifier; names and shapes must fit exactly."""
    if not os.path.isfile(path):
        raise ConfigError(
            f"model.pretrained is {path!r}, but there is no such file", "give true, false or the path of a weight file"
        )
    try:
        state = load_state_dict(path)
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        raise ModelError(
            f"weight file {path} cannot be read: {_reason(error)}",
            "give a state dict as safetensors, or as .pth made of tensors alone",
        ) from error
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    source = {**model.pretrained_cfg, "state_dict": None, "classifier": None, "label_offset": 0}
    try:
        state = _drop_classifiers(adapt(state, model) if adapt else state, model)
        # Without a classifier in the configuration timm loads strictly, after it has fitted the first convolution.
        load_pretrained(model, {**source, "state_dict": state}, num_classes=0, in_chans=channels)
    except Exception as error:  # each family's filter has its own way to fail on another family's file
        raise ModelError(
            f"weight file {path} does not fit model.backbone {name}: {_mismatch(model, state) or _reason(error)}",
            "give the weights of this very model",
        ) from error


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _drop_classifiers(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict without its classifiers, and without the norms that belong to them (e.g. LeViT's ``head.bn``)."""
    own = model.state_dict()
    stems = {classifier.split(".")[0] for classifier in _classifiers(model)}
    return {key: value for key, value in state.items() if key in own or key.split(".")[0] not in stems}


def _mismatch(model: nn.Module, state: dict[str, Tensor]) -> str:
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} ({'x'.join(map(str, state[key].shape))} for {'x'.join(map(str, own[key].shape))})"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{kind}: {_some(keys)}" for kind, keys in kinds.items() if keys)


def _some(keys: list[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --------------------------------------------------------------------------- export


def timm_export(net: CmlNet, params: Params) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Body and head as a plain timm model with ``output_dim`` classes.

    Running statistics are those the backbone was built or loaded with: where the network uses batch statistics,
    the plain model gives its logits in training mode of its BatchNorms only.

    Args:
        net: a network whose body is a :class:`TimmBackbone`.
        params: values by canonical name (``body.*``, ``head.*``; others are ignored).

    Returns:
        The state dict, and keyword arguments so that
        ``timm.create_model(name, num_classes=ways, checkpoint_path=file, **kwargs)`` loads it strictly.

    Raises:
        ModelError: the head does not fit the model's own classifier: export in this project's own format only.
    """
    body, head = net.body, net.head
    params = {**dict(net.named_buffers()), **params}  # frozen parameters are buffers
    assert isinstance(body, TimmBackbone) and isinstance(head, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        plain = _create(body.name, False, num_classes=head.out_features, **body.create_kwargs)
    plain.to(params["head.weight"].dtype)
    state = _body_state(plain, body, params)
    for number_used in (None, 1):
        candidate = _with_classifiers(state, plain, params, number_used)
        if candidate is not None and _same_logits(plain, candidate, net, params):
            return candidate, dict(body.create_kwargs)
    raise ModelError(
        f"model.backbone {body.name} has a classifier of its own kind ({', '.join(_classifiers(plain)) or 'unnamed'})"
        " that a linear head does not fit",
        "load the exported model with cml_dist.load instead of timm.create_model",
    )


def _body_state(plain: nn.Module, body: TimmBackbone, params: Params) -> dict[str, Tensor]:
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    for name, module in plain.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{PREFIX}{name}.weight" not in params:
            # A norm of the classifier's own, which our head does not have: an exact identity.
            state[f"{name}.running_var"] = torch.full_like(module.running_var, 1 - module.eps)
    ours = {**body.initial_buffers.by_name, **dict(body.model.named_buffers())}
    ours.update({name[len(PREFIX) :]: value for name, value in params.items() if name.startswith(PREFIX)})
    state.update({key: value.detach().clone() for key, value in ours.items() if key in state})
    return state


def _with_classifiers(
    state: dict[str, Tensor], plain: nn.Module, params: Params, number_used: int | None
) -> dict[str, Tensor] | None:
    """The state with the head in the classifiers (the first ``number_used`` of them; zeros in the others)."""
    state = dict(state)
    for number, classifier in enumerate(_classifiers(plain)):
        for kind in ("weight", "bias"):
            key, value = f"{classifier}.{kind}", params[f"head.{kind}"].detach()
            if key not in state or state[key].numel() != value.numel():
                return None
            used = number_used is None or number < number_used
            state[key] = value.reshape(state[key].shape).clone() if used else torch.zeros_like(state[key])
    return state


def _same_logits(plain: nn.Module, state: dict[str, Tensor], net: CmlNet, params: Params) -> bool:
    """Whether the plain model, under the same norm policy, gives the network's own logits on random images."""
    plain = copy.deepcopy(plain).eval()
    plain.load_state_dict(state, strict=True)
    prepare_for_second_order(plain, "batch" if couples_examples(net.body) else "frozen")
    weight = params["head.weight"]
    generator = torch.Generator().manual_seed(0)
    shape = (4, *net.body.input_shape)
    inputs = torch.randn(shape, generator=generator, dtype=weight.dtype).to(weight.device)
    plain.to(weight.device)
    with torch.no_grad():
        (expected,) = functional_call(net, params, (inputs,))
        logits = plain(inputs)
    tolerance = 1e-8 if weight.dtype == torch.float64 else 1e-3
    return logits.shape == expected.shape and bool(torch.allclose(logits, expected, rtol=tolerance, atol=tolerance))
