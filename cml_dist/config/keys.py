"""Every setting there is, with what it takes and means; and a configuration's own, with their sources. No torch."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from cml_dist.config import schema
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError
from cml_dist.registry import DOMAINS, METHODS, OWN_DOMAIN

_UNITS = {"s": "s", "gib": "GiB", "minutes": "min"}
"""By the last words of names."""

LONG = 44
"""Sources of settings of more characters stand behind them, and not in a column."""

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Setting:
    """One setting in words.

    Attributes:
        key: ``section.key``.
        default: as one would write it, or ``required``.
        takes: choices, or range and unit; empty where the description says it.
        help: the description, which may be empty.
        kind: of its values, or which there are, in words.
    """

    key: str
    default: str
    takes: str
    help: str
    kind: str

    @property
    def meaning(self) -> str:
        """All but the key in one line."""
        help, default = self.help, f"default {self.default}".replace("default required", "required")
        if self.default == "null" and "null: " in help:  # already there, with what it means
            help, default = help.replace("null: ", "default null: "), ""
        return "; ".join(filter(None, (self.takes, help, default)))


def all_settings(domain: str | None = None) -> dict[str, Setting]:
    """Every setting by its key, with those of one domain (default: of all)."""
    names = " | ".join(DOMAINS)
    found = {"domain.name": Setting("domain.name", "required", names, f"or {OWN_DOMAIN.help}", names)}
    domains = {**DOMAINS, schema.OWN: OWN_DOMAIN}
    models = [("domain", getattr(schema, entry.settings)) for name, entry in domains.items() if domain in (None, name)]
    models += [(name, info.annotation) for name, info in RunConfig.model_fields.items() if name != "domain"]
    for section, model in models:
        for setting in _settings(model, f"{section}."):
            found.setdefault(setting.key, setting)  # shots of images and of curves: the first says it
    return found


def valid_keys(domain: str | None = None) -> dict[str, str]:
    """Every setting as ``section.key`` -> its meaning, see :func:`all_settings`."""
    return {key: setting.meaning for key, setting in all_settings(domain).items()}


def matching(pattern: str) -> list[Setting]:
    """The setting of that key; else those whose key matches a glob or has ``pattern`` in it; else whose meaning has.

    Raises:
        ConfigError: there is none; the nearest names are given.
    """
    known = all_settings()
    if pattern in known:
        return [known[pattern]]
    glob = pattern if any(char in pattern for char in "*?[") else f"*{pattern}*"
    found = [setting for key, setting in known.items() if fnmatch.fnmatchcase(key, glob)]
    found = found or [setting for key, setting in known.items() if fnmatch.fnmatchcase(key.rpartition(".")[2], glob)]
    if found := found or [setting for setting in known.values() if pattern in setting.meaning]:
        return found
    by_word = {key.rpartition(".")[2]: key for key in known} | {key: key for key in known}
    near = dict.fromkeys(by_word[word] for word in difflib.get_close_matches(pattern, by_word, n=4, cutoff=0.5))
    remedy = f"did you mean {' or '.join(list(near)[:3])}?" if near else "cml-dist config --keys lists all"
    raise ConfigError(f"no setting matches {pattern!r}", remedy)


def _settings(model: Any, prefix: str) -> Iterator[Setting]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _settings(info.annotation, f"{prefix}{name}.")
            continue
        default = "required" if info.is_required() else as_yaml(info.default)
        takes = " | ".join(choice for choice in get_args(info.annotation) if isinstance(choice, str))
        bounds = ((sign, getattr(rule, word, None)) for rule in info.metadata for word, sign in _BOUNDS.items())
        limits = ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
        unit = _UNITS.get(name.rpartition("_")[2], "") if "_" in name else ""
        takes = takes or f"{limits} {unit}".strip()
        yield Setting(f"{prefix}{name}", default, takes, info.description or "", _kind(info.annotation))


def _kind(annotation: Any) -> str:
    """What a value is, in words: ``integer | null``."""
    kinds = {int: "integer", float: "number", str: "text", bool: "true | false", NoneType: "null"}
    if not (parts := get_args(annotation)):
        return kinds[annotation]
    if (origin := get_origin(annotation)) is Literal:
        return " | ".join(map(str, parts))
    if origin in (tuple, dict):
        return f"list of {_kind(parts[0])}" if origin is tuple else "mapping"
    return _kind(parts[0]) if origin is Annotated else " | ".join(map(_kind, parts))


# --------------------------------------------------------------------------- of one configuration


def annotated(config: RunConfig, sources: Mapping[str, str]) -> tuple[str, str]:
    """Settings as YAML, whole keys by section, with ``sources`` (of ``Layers``) as comments: (what differs, the rest).

    The first comes to the same configuration by itself: all but defaults, which may depend on the method; besides what
    a method's name, a preset or the command line set.
    """
    usual, nothing = _defaults(config), object()
    settings = flatten(config.model_dump(mode="json"))
    settings = {"domain.name": settings.pop("domain.name"), **settings}
    told = [k for k, v in settings.items() if sources.get(k, "recipe") != "recipe" or usual.get(k, nothing) != v]
    lines = {key: f"{key}: {as_yaml(value)}" for key, value in settings.items()}

    def text(keys: list[str]) -> str:
        width = max((len(lines[key]) for key in keys if len(lines[key]) <= LONG), default=0)
        blocks = groupby(keys, lambda key: key.partition(".")[0])
        said = {key: f"{lines[key]:{width}}  # {sources[key]}" if key in sources else lines[key] for key in keys}
        return "\n".join("".join(f"{said[key]}\n" for key in block) for _, block in blocks)

    return text(told), text([key for key in settings if key not in told])


def _defaults(config: RunConfig) -> dict[str, Any]:
    """What a file has that names the domain and the method alone; what a domain requires is not in it."""
    optim = METHODS[config.method.name].optim if config.method.name in METHODS else {}
    given = {"method": {"name": config.method.name}, "optim": optim}
    flat: dict[str, Any] = {}
    for name, section in config:
        needed = [key for key, info in type(section).model_fields.items() if info.is_required()]
        told = {key: getattr(section, key) for key in needed}
        made = type(section).model_validate({**told, **given.get(name, {})})
        flat |= flatten(made.model_dump(mode="json", exclude=set(needed)), f"{name}.")
    return flat | {"method.name": schema.MethodConfig.model_fields["name"].default}


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as ``section.key`` -> value."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}{key}.") if value and isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def as_yaml(value: Any) -> str:
    """A value as one would write it in an override."""
    return yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]
