"""From the settings to the network and the method that trains it; initial values are a pure function of the seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from cml_dist.config.methods import (
    colearner_kind,
    has_upper_ascent,
    lora_rank,
    unlabelled_kind,
    unlabelled_steps,
    warp_settings,
)
from cml_dist.config.schema import ModelConfig, RunConfig
from cml_dist.errors import ConfigError
from cml_dist.meta.rule import Method, part_of
from cml_dist.meta.unlabelled import Unlabelled
from cml_dist.methods.build import rule_of
from cml_dist.methods.mgaug import Pruning
from cml_dist.methods.warpgrad import is_warp
from cml_dist.nets.colearner import build_colearner
from cml_dist.nets.guard import has_batch_norm, prepare_for_second_order
from cml_dist.nets.heads import build_head
from cml_dist.nets.network import CmlNet
from cml_dist.nets.own import check_body
from cml_dist.nets.partition import channels_of, freeze, layers_of, linear_weights, norms_a_step, select
from cml_dist.nets.warp import add_warps
from cml_dist.registry import TIMM, backbone_entry, method_entry
from cml_dist.types import BODY, COLEARNER, HEAD, Params
from cml_dist.user_code import blamed, is_code

PARTS = (BODY, HEAD, COLEARNER)


def build_net(
    model: ModelConfig,
    *,
    input_shape: tuple[int, ...],
    output_dim: int,
    seed: int,
    colearner: bool,
    prototypes: bool = False,
    warp: Mapping[str, Any] | None = None,
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
        warp: ``kind`` and ``residual`` of the layers between the body's (``method.warp``); None: there are none.
        structure_only: all values will be replaced (an exported model's): no pre-trained weights are read or needed.

    Raises:
        ConfigError: the backbone does not read such inputs, has no places for warp layers, or ``model.norm=frozen`` has
            no statistics to freeze.
        ModelError: the backbone is unknown, or does not take the image size or channels.
    """
    backbone, own = backbone_entry(model.backbone), is_code(model.backbone)
    images = backbone.reads == "images"
    if not own and len(input_shape) != (3 if images else 1):
        reads, others = ("images (C, H, W)", "mlp") if images else (backbone.reads, "conv4 or a timm model")
        raise ConfigError(
            f"model.backbone {model.backbone} reads {reads}, but the domain's inputs have shape {tuple(input_shape)}",
            f"set model.backbone to {others}, or choose another domain",
        )
    if model.pretrained and backbone is not TIMM:
        raise ConfigError(
            f"model.pretrained is {model.pretrained}, but model.backbone {model.backbone} has no pre-trained weights",
            "set model.pretrained=false, or choose a timm backbone",
        )
    settings = model.model_copy(update={"pretrained": False}) if structure_only else model
    with _part_seed(seed, BODY):
        body = backbone.load()(settings, input_shape)
    start = model.pretrained or model.init_from
    if model.norm == "frozen" and has_batch_norm(body) and not (start or structure_only or own):
        raise ConfigError(
            f"model.norm is frozen, but model.backbone {model.backbone} has no pre-trained statistics to freeze",
            "set model.norm=batch, or model.pretrained to true or a weight file (timm backbones)",
        )
    prepare_for_second_order(body, model.norm)
    if own:
        check_body(body, model.backbone, input_shape)
    if warp is not None:
        with _part_seed(seed, BODY):  # their values are fixed, but torch draws some first
            add_warps(body, model.backbone, **warp)
    with _part_seed(seed, HEAD):
        head = build_head(model.head, body.pooled_dim, output_dim)
    with _part_seed(seed, COLEARNER):
        outputs = model.colearner.width if prototypes else output_dim
        second = build_colearner(model, body, outputs) if colearner else None
    net = CmlNet(body, head, second, prototypes=prototypes and colearner, feature_length=model.feature_length)
    prepare_for_second_order(net, model.norm)
    return net


@contextmanager
def _part_seed(seed: int, part: str) -> Iterator[None]:
    """A random stream for one part; only the CPU's generator is touched, and it is put back."""
    state = np.random.SeedSequence([seed, PARTS.index(part)]).generate_state(2, np.uint32)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(state[0]) << 32 | int(state[1]))
        yield


def make_network(
    config: RunConfig,
    input_shape: tuple[int, ...],
    output_dim: int,
    *,
    start: Params | None = None,
    structure_only: bool = False,
) -> CmlNet:
    """The network that a configuration names, with what its method learns; a pure function of ``run.seed`` and start.

    Arguments as of :func:`build_net`; ``start``: values that are taken over where name and shape are the same.

    Raises:
        ConfigError: ``model.trained`` or ``method.adapts`` names what the network has not, or nothing is trained.
    """
    net = build_net(
        config.model,
        input_shape=input_shape,
        output_dim=output_dim,
        seed=config.run.seed,
        colearner=config.method.colearner is not False,
        prototypes=colearner_kind(config) == "prototype",
        warp=warp_settings(config.method),
        structure_only=structure_only,
    )
    net.take_over(start or {})  # a rule may start from them
    freeze(net, select(net, config.model.trained, "model.trained"), colearner=config.method.colearner == "untrained")
    if next(net.parameters(), None) is None:
        raise ConfigError(
            f"model.trained is {list(config.model.trained)}, but model.head {config.model.head} has no parameters: "
            "nothing would be trained",
            "set model.trained to more, e.g. [head,last:1], or another model.head",
        )
    rule = method_of(config, net).rule
    with blamed(config.method.name, "fails in init"):
        net.add_rule(rule.init(net.adaptable()), rule.replaces)
    net.take_over(start or {})
    return net


def method_of(config: RunConfig, net: CmlNet) -> Method:
    """The method, with the parameters of ``net`` that adapt.

    Raises:
        ConfigError: ``method.adapts`` names what the network has not, has not as something trained, or what the method
            does not adapt; or nothing that is learned is left.
    """
    method, adapts, rank = config.method, None, lora_rank(config.method.adapts)
    both_adapt = method.colearner == "adapts"
    if method.adapts is not None:
        terms = [term for term in method.adapts if not lora_rank([term])]
        adapts = select(net, terms, "method.adapts", adapting=True)
        rows = {*norms_a_step(net)} if method.name == "maml_pp" else set()
        idle = [term for term in terms if rows.issuperset(select(net, [term], "method.adapts", adapting=True))]
        if idle:
            what = f"method.adapts has {idle[0]}, but under method.name maml_pp BatchNorm has values for each step"
            raise ConfigError(f"{what}, which do not adapt", f"leave {idle[0]} out")
        only = method_entry(method.name).adapts_only
        strays = [n for n in adapts if only is not None and part_of(n) != only]
        if strays:
            raise ConfigError(
                f"method.adapts selects {strays[0]}, but method.name {method.name} adapts the {only} alone",
                "leave method.adapts out, or set method.name=maml",
            )
        adapts = frozenset([*adapts, *(n for n in net.adaptable() if part_of(n) == COLEARNER and both_adapt)])
    further: dict[str, Any] = {}
    if rank:
        further = {"rank": rank, "beside": linear_weights(net), "seed": config.run.seed}
    elif method.name == "maml_pp":
        further = {"norms": norms_a_step(net)}
    if method.warp:
        if not any(map(is_warp, dict(net.named_parameters()))):
            what = f"method.name {method.name} trains warp layers, which model.trained freezes"
            raise ConfigError(what, "set model.trained=[body,head], or add last:1 or body.*.warp.*")
        moving = frozenset(n for n in (net.adaptable() if adapts is None else adapts) if not is_warp(n))
        if adapts and not moving:
            what = f"method.adapts selects warp layers alone, which never adapt under method.name {method.name}"
            raise ConfigError(what, "name what stands between them, or leave method.adapts out")
        adapts = moving
    rule = rule_of(method, adapts=adapts, parts=PARTS if both_adapt else (BODY, HEAD), **further)
    if config.model.head == "shared" and not (
        rule.head_lr and any(part_of(n) == HEAD for n in rule.rates(net.adaptable()))
    ):
        what = "model.head is shared, but the head does not adapt: all classes keep the same vector"
        raise ConfigError(what, "let it adapt (method.name, method.adapts, method.head_lr), or set model.head=centroid")
    ascent = method.radius if has_upper_ascent(config) else 0.0
    augment = _pruning(config, net) if method.augment else None
    gamma, order, annealed = method.gamma or 0.0, method.order or 2, method.first_order_steps
    unlabelled = None
    if (kind := unlabelled_kind(config)) != "none":
        refinement = method.label_rate if kind == "meta_gradient" else 0.0
        how = (unlabelled_steps(config), method.unlabelled_weight, method.label_temperature, refinement)
        unlabelled = Unlabelled(*how)
    return Method(method.inner_steps, rule, gamma, order, both_adapt, annealed, ascent, augment, unlabelled)


def _pruning(config: RunConfig, net: CmlNet) -> Pruning:
    """MGAug's sub-networks of ``net``.

    Raises:
        ConfigError: the body is frozen, or does not say which of its tensors are of the same channels.
    """
    method = config.method
    if not any(part_of(n) == BODY for n, _ in net.named_parameters()):
        raise ConfigError(
            "method.augment prunes the body, which is frozen",
            "leave method.augment out, or set model.trained to more, e.g. [head,last:1]",
        )
    groups = channels_of(net, config.model.backbone) if method.augment_pruning == "width" else layers_of(net)
    drawn = method.augment_pruning, method.augment_ratios, groups, config.run.seed
    return Pruning(*drawn, method.augment_weight, method.augment_scope)
