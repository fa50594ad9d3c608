"""From the settings to the inner rule, and from an exported model's description to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from cml_dist.config.schema import MethodConfig
from cml_dist.meta.rule import InnerRule
from cml_dist.methods.lora import Lora
from cml_dist.methods.own import own_class, own_rule
from cml_dist.registry import INNER_OPTIMS, METHODS
from cml_dist.user_code import is_code


def rule_of(method: MethodConfig, **more: Any) -> InnerRule:
    """The rule that ``method`` names.

    Args:
        more: members that depend on the network; with a rank, of :class:`Lora`.
    """
    rates = {
        "body_lr": method.rate if method.body_lr is None else method.body_lr,
        "head_lr": method.rate if method.head_lr is None else method.head_lr,
    }
    if "rank" in more:
        return Lora(**rates, **more)
    if is_code(method.name):
        return own_rule(method, **rates, **more)
    own = {
        "momentum": {"momentum": method.inner_momentum},
        "adam": {"betas": method.inner_betas},
        "maml_pp": {
            "steps": method.inner_steps,
            "multi_step_loss": method.multi_step_loss,
            "multi_step_every": method.multi_step_every,
        },
        "sharp_maml": {"radius": method.radius, "exact": method.ascent == "exact"},
    }
    named = METHODS[method.name].target and method.sharp != "upper"  # whose inner steps are plain ones
    name, table = (method.name, METHODS) if named else (method.inner_optim, INNER_OPTIMS)
    return table[name].load()(**rates, **own.get(name, {}), **more)


def describe_rule(rule: InnerRule, method: str, names: list[str]) -> dict[str, Any]:
    """A rule as JSON, from which :func:`described_rule` makes it again.

    Args:
        method: ``method.name``.
        names: what adapts.
    """
    return {"kind": method if is_code(method) else type(rule).__name__, **asdict(rule), "adapts": names}


def described_rule(described: Mapping[str, Any]) -> InnerRule:
    """The rule of an exported model."""
    members = dict(described)
    rules = (entry.load() for entry in (*INNER_OPTIMS.values(), *METHODS.values()) if entry.target)
    kind = members.pop("kind")
    cls = own_class(kind) if is_code(kind) else {rule.__name__: rule for rule in (*rules, Lora)}[kind]
    adapts = frozenset(members.pop("adapts"))
    rule = cls(adapts=adapts, **{k: tuple(v) if isinstance(v, list) else v for k, v in members.items()})
    # Whoever made the export may have written anything.
    return rule if is_code(kind) else TypeAdapter(cls).validate_python(vars(rule))
