"""From the settings to the network and the method that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cml_dist.config.methods import METHODS, colearner_kind
from cml_dist.config.schema import MethodConfig, RunConfig
from cml_dist.errors import ConfigError
from cml_dist.meta.rule import InnerRule, Method, part_of
from cml_dist.methods.inner_optim import Adam, Momentum
from cml_dist.methods.meta_sgd import MetaSgd
from cml_dist.nets.build import build_net
from cml_dist.nets.network import CmlNet
from cml_dist.nets.partition import freeze, select
from cml_dist.types import BODY, COLEARNER, HEAD


def make_network(
    config: RunConfig, input_shape: tuple[int, ...], output_dim: int, *, structure_only: bool = False
) -> CmlNet:
    """The network that a configuration names, with what its method learns; a pure function of ``run.seed``.

    Arguments as of :func:`build_net`.

    Raises:
        ConfigError: ``model.trained`` or ``method.adapts`` names what the network has not.
    """
    net = build_net(
        config.model,
        input_shape=input_shape,
        output_dim=output_dim,
        seed=config.run.seed,
        colearner=config.method.colearner is not False,
        prototypes=colearner_kind(config) == "prototype",
        structure_only=structure_only,
    )
    freeze(net, select(net, config.model.trained, "model.trained"), colearner=config.method.colearner == "untrained")
    net.add_rule(method_of(config, net).rule.init(net.adaptable()))
    return net


def method_of(config: RunConfig, net: CmlNet) -> Method:
    """The method, with the parameters of ``net`` that adapt.

    Raises:
        ConfigError: ``method.adapts`` names what the network has not, has not as something trained, or what the method
            does not adapt; or nothing that is learned is left.
    """
    method = config.method
    adapts = None
    if method.adapts is not None:
        adapts = select(net, method.adapts, "method.adapts", adapting=True)
        only = METHODS[method.name].adapts_only
        strays = [n for n in adapts if only is not None and part_of(n) != only]
        if strays:
            raise ConfigError(
                f"method.adapts selects {strays[0]}, but method.name {method.name} adapts the {only} alone",
                "leave method.adapts out, or set method.name=maml",
            )
        adapts += [n for n in net.adaptable() if part_of(n) == COLEARNER and method.colearner == "adapts"]
    parts = (BODY, HEAD, COLEARNER) if method.colearner == "adapts" else (BODY, HEAD)
    return Method(
        method.inner_steps,
        rule_of(method, adapts=None if adapts is None else frozenset(adapts), parts=parts),
        gamma=method.gamma or 0.0,
        order=method.order or 2,
        both_adapt=method.colearner == "adapts",
    )


def rule_of(method: MethodConfig, **more: Any) -> InnerRule:
    """The rule that ``method`` names; ``more`` are members of :class:`InnerRule`."""
    rates = {
        "body_lr": method.inner_lr if method.body_lr is None else method.body_lr,
        "head_lr": method.inner_lr if method.head_lr is None else method.head_lr,
    }
    if method.name == "meta_sgd":
        return MetaSgd(**rates, **more)
    if method.inner_optim == "momentum":
        return Momentum(**rates, **more, momentum=method.inner_momentum)
    if method.inner_optim == "adam":
        return Adam(**rates, **more, betas=method.inner_betas)
    return InnerRule(**rates, **more)


RULES: Mapping[str, type[InnerRule]] = {cls.__name__: cls for cls in (InnerRule, MetaSgd, Momentum, Adam)}
"""Rules by the name that an exported model keeps."""


def describe_rule(rule: InnerRule, names: list[str]) -> dict[str, Any]:
    """A rule as JSON, from which :func:`described_rule` makes it again; ``names`` are what adapts."""
    return {"kind": type(rule).__name__, **asdict(rule), "adapts": names}


def described_rule(described: Mapping[str, Any]) -> InnerRule:
    """The rule of an exported model."""
    members = dict(described)
    cls = RULES[members.pop("kind")]
    adapts = frozenset(members.pop("adapts"))
    return cls(adapts=adapts, **{k: tuple(v) if isinstance(v, list) else v for k, v in members.items()})
