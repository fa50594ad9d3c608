"""Any timm model as a backbone, and the way back to plain timm."""

from __future__ import annotations

import copy
import difflib
import os
import sys
from typing import Any, NamedTuple

import timm
import torch
from timm.models import load_pretrained, load_state_dict
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

import cml_dist.nets.resnet12  # noqa: F401 - registers it
from cml_dist.config.schema import ModelConfig
from cml_dist.errors import ConfigError, ModelError
from cml_dist.nets.border import border_warning, watch_stem
from cml_dist.nets.guard import couples_examples, prepare_for_second_order
from cml_dist.nets.network import CmlNet
from cml_dist.nets.pretrained import Weights, find_weights, reason
from cml_dist.registry import BACKBONES
from cml_dist.telemetry.text import shape_in_words
from cml_dist.types import BODY, INTERPOLATIONS, Features, Params

PREFIX = f"{BODY}.model."
"""Canonical names of the backbone's parameters are this, and then timm's own names."""


class TimmBackbone(nn.Module):
    """A timm model without its classifier.

    ``tap`` is what ``forward_features`` gives: a map ``[N, C, H, W]`` or tokens ``[N, T, C]``; for the few models
    that give several (coat, crossvit, efficientvim) it is ``pooled``. ``pooled`` is ``forward_head(pre_logits=True)``.
    ``border_warning`` says which border of the images the model never sees, if any.

    Args:
        name: the model's name in timm, e.g. ``"resnet18"`` or ``"vit_tiny_patch16_224.augreg_in21k"``.
        input_shape: ``(channels, height, width)`` of one image.
        pretrained: False, or what :func:`cml_dist.nets.pretrained.find_weights` finds.

    Raises:
        ModelError: timm has no such model, the model refuses the image size or channels, or the weights are not there
            or do not fit.
        ConfigError: the weights do not exist, or are another model's.
    """

    def __init__(self, name: str, input_shape: tuple[int, int, int], pretrained: bool | str = False) -> None:
        super().__init__()
        self.name, self.input_shape = name, tuple(input_shape)
        self.create_kwargs = _create_kwargs(name, input_shape)
        weights = find_weights(name, pretrained) if pretrained else None
        # timm reads a foreign format under the name that has it.
        is_foreign = weights is not None and weights.file is None
        named = pretrained if is_foreign and isinstance(pretrained, str) else name
        self.model = _create(named, is_foreign, num_classes=0, **self.create_kwargs)
        if weights is not None and not is_foreign:
            _load(self.model, name, weights, input_shape[0])
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        try:  # shapes without the batch axis, by a forward pass that computes nothing
            with torch.no_grad():
                stateless = copy.deepcopy(self.model).to("meta").eval()
                convolutions = watch_stem(stateless)
                features = self._features(stateless, torch.empty(2, *input_shape, device="meta"))
        except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
            usual = self.model.pretrained_cfg.get("input_size")
            given, made_for = (shape_in_words(shape) if shape else "?" for shape in (input_shape, usual))
            raise ModelError(
                f"model.backbone {name} cannot take images of {given}: {reason(error)}",
                f"use images it can take (it was made for {made_for}), or another model.backbone",
            ) from error
        self.tap_shape, self.pooled_dim = tuple(features.tap.shape[1:]), features.pooled.shape[1]
        self.border_warning = border_warning(name, self.input_shape[1:], *convolutions[0]) if convolutions else None

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

    def channel_groups(self) -> list[list[str]] | None:
        """Names of the tensors whose first axis is the same channels; None: this model does not say."""
        found = self.model.channel_groups() if hasattr(self.model, "channel_groups") else None
        return found and [[f"model.{name}" for name in group] for group in found]

    def warp_places(self) -> list[tuple[nn.Module, int]]:
        """The modules that own warp layers, with their channels; none where this model has no places for them."""
        return self.model.warp_places() if hasattr(self.model, "warp_places") else []

    def forward(self, inputs: Tensor) -> Features:
        """Features of images ``[N, C, H, W]``, or those that :meth:`kept` made of them: ``[N, K]``."""
        if inputs.ndim == 4:
            return self._features(self.model, inputs)
        tap, pooled = inputs.split([inputs.shape[1] - self.pooled_dim, self.pooled_dim], dim=1)
        return Features(tap.unflatten(1, self.tap_shape) if tap.shape[1] else pooled, pooled)

    def kept(self, features: Features, with_tap: bool) -> Tensor:
        """Features as one vector an image, ``[N, K]``, without their tap where nobody reads it."""
        return torch.cat([features.tap.flatten(1), features.pooled], 1) if with_tap else features.pooled

    def _features(self, model: nn.Module, inputs: Tensor) -> Features:
        features = model.forward_features(inputs)
        pooled = model.forward_head(features, pre_logits=True)
        if not isinstance(features, Tensor):
            return Features(tap=pooled, pooled=pooled)
        tap = features.permute(0, 3, 1, 2) if self.channels_last and features.ndim == 4 else features
        return Features(tap=tap, pooled=pooled)


def build(model: ModelConfig, input_shape: tuple[int, ...]) -> TimmBackbone:
    return TimmBackbone(model.backbone, input_shape, model.pretrained)


class TrainedOn(NamedTuple):
    """Images that weights were trained on: mean and std per channel (of pixels in 0..1), height and width, and how they
    were brought to that size (a name of :data:`cml_dist.types.INTERPOLATIONS`).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    interpolation: str


def trained_with(name: str, pretrained: bool | str, channels: int) -> TrainedOn | None:
    """What timm, or who saved them, says of the images that weights were trained on; None: nobody does.

    Of grey images, for which timm adds up the weights of three channels, mean and std are the channels' mean.
    """
    config = find_weights(name, pretrained).config
    if config is None or not config.mean or not config.std:
        return None

    def of_channels(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(values) if channels == len(values) else (sum(values) / len(values),) * channels

    interpolation = config.interpolation if config.interpolation in INTERPOLATIONS else "bicubic"  # some draw one
    return TrainedOn(of_channels(config.mean), of_channels(config.std), tuple(config.input_size)[1:], interpolation)


# --------------------------------------------------------------------------- building


def _create_kwargs(name: str, input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What ``timm.create_model`` must be told about the images."""
    if not timm.is_model(name):
        known = timm.list_models()
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        hint = f"use one of the nearest names: {', '.join(near)}" if near else "timm.list_models() has the names"
        own = ", ".join(BACKBONES)
        raise ModelError(f"model.backbone {name!r} is neither {own} nor one of timm's {len(known)} models", hint)
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    fixed = config is not None and config.fixed_input_size
    return {"in_chans": input_shape[0], **({"img_size": tuple(input_shape[1:])} if fixed else {})}


def _create(name: str, published: bool, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=published, **kwargs)
    except Exception as error:  # timm and its download clients raise of every kind
        what, remedy = f"timm cannot build model.backbone {name} with {kwargs}", "use images it can take"
        if published:
            what = f"the published weights of {name} cannot be had"
            remedy = "check the network, set model.pretrained to a local weight file or false"
        raise ModelError(f"{what}: {reason(error)}", f"{remedy}, or another model.backbone") from error


def _load(model: nn.Module, name: str, weights: Weights, channels: int) -> None:
    """Loads weights into a model without classifier; names and shapes must fit exactly."""
    path = weights.file()
    if not os.path.isfile(path):
        raise ConfigError(
            f"model.pretrained is {str(path)!r}, but there is no such file",
            "give true, a weight file, a folder of one with its config.json, a timm name such as resnet18.a1_in1k, or "
            "hf-hub:ORG/NAME",
        )
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = load_state_dict(str(path), weights_only=True)
        state = adapt(state, model) if adapt else state
        # Without its classifiers, and the norms that belong to them (e.g. LeViT's ``head.bn``).
        own, stems = model.state_dict(), {classifier.split(".")[0] for classifier in _classifiers(model)}
        state = {key: value for key, value in state.items() if key in own or key.split(".")[0] not in stems}
        # Without a classifier in the configuration timm loads strictly, after it has fitted the first convolution.
        source = {**model.pretrained_cfg, "state_dict": state, "classifier": None, "label_offset": 0}
        if weights.config is not None:  # the channels of the first convolution are the weights' own
            source["input_size"] = weights.config.input_size
        load_pretrained(model, source, num_classes=0, in_chans=channels)
    except Exception as error:  # a damaged file, or another family's, fails in as many ways as there are formats
        raise ModelError(
            f"{weights.called} does not fit model.backbone {name}: {reason(error)}",
            "give the weights of this very model: a state dict as safetensors, or as .pth made of tensors alone",
        ) from error


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


# --------------------------------------------------------------------------- export


def timm_export(net: CmlNet, params: Params, with_head: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Body and head as a plain timm model with ``output_dim`` classes; without the head with none.

    Where the network uses batch statistics, running ones are timm's initial values, and the plain model gives the
    network's logits in training mode of its BatchNorms only.

    Args:
        net: a network whose body is a :class:`TimmBackbone`.
        params: values by canonical name (``body.*``, ``head.*``; others are ignored).

    Returns:
        The state dict, and keyword arguments so that
        ``timm.create_model(name, num_classes=ways, checkpoint_path=file, **kwargs)`` loads it strictly.

    Raises:
        ModelError: the head does not fit the model's own classifier: export in this project's own format only.
    """
    body, classes = net.body, net.head.out_features if with_head else 0
    params = {**dict(net.named_buffers()), **params}  # frozen parameters are buffers
    with torch.random.fork_rng(devices=[]):
        plain = _create(body.name, False, num_classes=classes, **body.create_kwargs)
    plain.to(next(value.dtype for value in params.values() if value.is_floating_point()))
    state = plain.state_dict()
    ours = {name.removeprefix(PREFIX): value for name, value in params.items() if name.startswith(PREFIX)}
    for classifier in _classifiers(plain) if with_head else ():
        ours |= {f"{classifier}.{kind}": params[f"head.{kind}"] for kind in ("weight", "bias")}
    for name, module in plain.named_modules():
        if isinstance(module, _BatchNorm) and f"{PREFIX}{name}.weight" not in params:
            # A norm of the classifier's own, which our head does not have: an exact identity.
            ours[f"{name}.running_var"] = torch.full_like(module.running_var, 1 - module.eps)
    try:
        # Into the model first: what is tied has one of its names in ours, and must have the same value under all.
        fitted = {k: v.detach().reshape(state[k].shape) for k, v in ours.items() if k in state}
        plain.load_state_dict(fitted, strict=False)
        state = {key: value.clone() for key, value in plain.state_dict().items()}
        fits = not with_head or _same_logits(plain, state, net, params)
    except RuntimeError:  # other sizes
        fits = False
    if not fits:
        raise ModelError(
            f"model.backbone {body.name} has a classifier of its own kind "
            f"({', '.join(_classifiers(plain)) or 'unnamed'}) that a linear head does not fit",
            "load the exported model with cml_dist.load instead of timm.create_model",
        )
    return state, dict(body.create_kwargs)


def hub_config(
    body: TimmBackbone, num_classes: int, kwargs: dict[str, Any], preprocessing: dict[str, Any]
) -> dict[str, Any]:
    """``config.json`` beside weights of :func:`timm_export`, for ``timm.create_model("local-dir:FOLDER")``.

    Args:
        kwargs: as :func:`timm_export` returned them.
        preprocessing: mean and std of each channel, and interpolation.
    """
    pretrained = {
        "num_classes": num_classes,
        "input_size": body.input_shape,
        "fixed_input_size": "img_size" in kwargs,
        "interpolation": preprocessing.get("interpolation", "bicubic"),
        "crop_pct": 1.0,
        "classifier": body.model.pretrained_cfg.get("classifier"),
        **{key: preprocessing[key] for key in ("mean", "std") if key in preprocessing},
    }
    named = {"architecture": body.name.partition(".")[0], "num_classes": num_classes}
    return {**named, "model_args": kwargs, "pretrained_cfg": pretrained}


def _same_logits(plain: nn.Module, state: dict[str, Tensor], net: CmlNet, params: Params) -> bool:
    """Whether the plain model, under the same norm policy, gives the network's own logits on random images."""
    plain.load_state_dict(state, strict=True)
    prepare_for_second_order(plain, "batch" if couples_examples(net.body) else "frozen")
    weight, generator = params["head.weight"], torch.Generator().manual_seed(0)
    inputs = torch.randn(4, *net.body.input_shape, generator=generator, dtype=weight.dtype).to(weight.device)
    plain.to(weight.device)
    with torch.no_grad():
        (expected,), logits = functional_call(net, params, (inputs,)), plain(inputs)
    tolerance = 1e-8 if weight.dtype == torch.float64 else 1e-3
    return logits.shape == expected.shape and bool(torch.allclose(logits, expected, rtol=tolerance, atol=tolerance))
