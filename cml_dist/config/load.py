"""From YAML and ``key=value`` overrides to a checked, frozen :class:`RunConfig`; the only reader of such files."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cml_dist.config import schema
from cml_dist.config.methods import METHODS, NAME_DECIDES, family
from cml_dist.config.recipes import find_recipe
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe by path or short name and apply ``key=value`` overrides.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid one), or a value out of range.
    """
    return parse_config(layered(read_yaml(find_recipe(path)), overrides).data, source=str(path))


@dataclass(frozen=True)
class Layers:
    """A configuration before it is checked, put together from its layers.

    Attributes:
        data: nested settings.
        sources: where each ``section.key`` that is not the schema's default is from: ``method NAME``, ``recipe`` or
            ``command line``.
        gave_way: the recipe's ``method.*`` that another method's name on the command line replaced, with their values.
    """

    data: dict[str, Any]
    sources: dict[str, str]
    gave_way: dict[str, Any]


def layered(recipe: Mapping[str, Any], overrides: Sequence[str]) -> Layers:
    """Schema < the method's published defaults < recipe < command line.

    A recipe's ``method.*`` counts for the method that it names and its family (cml, maml and fomaml are one). Under
    another name that method's own defaults count; within the family what the name decides does.
    """
    data = merge(recipe, overrides)
    given, chosen = flatten(recipe), {override.partition("=")[0] for override in overrides}
    section = data.get("method")
    gave_way: dict[str, Any] = {}
    if isinstance(section, dict) and isinstance(section.get("name", "cml"), str):
        then, now = given.get("method.name", "cml"), section.get("name", "cml")
        dropped = ()
        if then != now:
            dropped = NAME_DECIDES if family(then) == family(now) else tuple(key for key in section if key != "name")
        for key in dropped:
            if f"method.{key}" in given and f"method.{key}" not in chosen:
                gave_way[f"method.{key}"] = section.pop(key)
        defaults = METHODS[now].settings if now in METHODS else {}
        has_colearner = section.get("colearner", defaults.get("colearner", False)) is not False
        switched = chosen & {"method.name", "method.colearner"} and "method.gamma" not in chosen
        if not has_colearner and section.get("gamma") and switched:
            gave_way["method.gamma"] = section.pop("gamma")
        sources = {f"method.{key}": f"method {now}" for key in defaults if section.get(key) is None}
    else:
        sources = {}
    for key, value in flatten(data).items():
        if value is None and key in sources:
            continue  # asked for what the method says
        if key in chosen or any(key.startswith(f"{section_key}.") for section_key in chosen):
            sources[key] = "command line"
        elif key in given:
            sources[key] = "recipe"
    return Layers(data, sources, gave_way)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}", "correct the file at that place") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no mapping of sections", "start from a file in configs/recipes")
    return data


def merge(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``data`` with ``section.key=value`` assignments applied; values are read as YAML."""
    merged = _copied(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            raise ConfigError(
                f"override {override!r} is not of the form section.key=value", "write e.g. train.steps=1000"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {override!r} is no valid YAML", "quote it for your shell") from error
        *sections, last = key.split(".")
        target = merged
        for depth, section in enumerate(sections):
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(
                    f"override {override!r}: {'.'.join(sections[: depth + 1])} is a value, not a section",
                    f"set it whole: {'.'.join(sections[: depth + 1])}=...",
                )
        if isinstance(target.get(last), dict) and not isinstance(value, dict):
            raise ConfigError(f"override {override!r}: {key} is a section", f"set one of its keys, {_example(key)}")
        target[last] = value
    return merged


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def parse_config(data: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """The checked configuration in plain ``data``; every fault in one ConfigError."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        faults = [_fault(e) for e in error.errors()]
        raise ConfigError(
            f"{source}: " + "; ".join(what for what, _ in faults),
            "; ".join(dict.fromkeys(remedy for _, remedy in faults if remedy)),
        ) from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def annotated(config: RunConfig, sources: Mapping[str, str]) -> str:
    """The same as :func:`dump_config` with the source of each setting that is no default, as comments."""
    lines: list[str] = []

    def section(data: Mapping[str, Any], prefix: str, indent: str) -> None:
        for key, value in data.items():
            if isinstance(value, Mapping) and value:
                lines.append(f"{indent}{key}:")
                section(value, f"{prefix}{key}.", f"{indent}  ")
                continue
            text = yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]
            source = sources.get(f"{prefix}{key}")
            lines.append(f"{indent}{key}: {text}" + (f"  # {source}" if source else ""))

    section(config.model_dump(mode="json"), "", "")
    return "\n".join(lines) + "\n"


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as ``section.key`` -> value."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# --------------------------------------------------------------------------- messages


def _fault(error: Mapping[str, Any]) -> tuple[str, str]:
    """(what, remedy) of one pydantic error."""
    # The tag of a discriminated union ("glyphs") stands in the location; users never wrote it.
    loc = [str(part) for part in error["loc"]]
    if len(loc) > 1 and loc[0] == "domain" and loc[1] in _DOMAINS:
        tag = loc.pop(1)
    else:
        tag = None
    key = ".".join(loc)
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, valid_keys(tag), n=1, cutoff=0.5)
        return f"{key} is not a setting" + (f" of domain {tag}" if tag else ""), (
            f"did you mean {near[0]}?" if near else "see cml-dist config --keys"
        )
    if error["type"] == "missing":
        return f"{key} is not set", f"add {key}=..."
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name") if isinstance(value, Mapping) else value
        near = difflib.get_close_matches(str(name), _DOMAINS, n=1)
        return f"domain.name is {name!r}", f"use one of {', '.join(_DOMAINS)}" + (
            f" (nearest: {near[0]})" if near else ""
        )
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} is {value!r}, but it is a section", f"set its keys, {_example(key)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message, ""
    near = difflib.get_close_matches(str(value), _literals(error), n=1)
    remedy = message[:1].lower() + message[1:]
    remedy = remedy.replace("input should", f"{key} should", 1)
    return f"{key} is {value!r}", remedy + (f" (nearest: {near[0]})" if near else "")


def _example(section: str) -> str:
    """A key of a section, for a remedy."""
    return f"e.g. {next(key for key in valid_keys() if key.startswith(f'{section}.'))}=..."


def _literals(error: Mapping[str, Any]) -> list[str]:
    expected = error.get("ctx", {}).get("expected", "")
    return [part.strip(" '\"") for part in str(expected).replace(" or ", ",").split(",")] if expected else []


_DOMAINS: dict[str, type[BaseModel]] = {
    "glyphs": schema.GlyphsConfig,
    **{name: schema.ImagesConfig for name in ("images", "omniglot", "cifar_fs", "fc100", "mini_imagenet")},
    "sinusoid": schema.SinusoidConfig,
}


def valid_keys(domain: str | None = None) -> dict[str, str]:
    """Every setting as ``section.key`` -> its description, with those of one domain (default: of all)."""
    keys = {"domain.name": " | ".join(_DOMAINS) + "; required"}
    for name, model in _DOMAINS.items():
        if domain in (None, name):
            for key, meaning in _keys(model, "domain.").items():
                keys.setdefault(key, meaning)  # shots of images and of curves: the first says it
    for name, info in RunConfig.model_fields.items():
        if name != "domain":
            keys.update(_keys(info.annotation, f"{name}."))
    return keys


def _as_yaml(value: Any) -> str:
    """A value as one would write it in an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _keys(model: Any, prefix: str) -> dict[str, str]:
    keys: dict[str, str] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys.update(_keys(info.annotation, f"{prefix}{name}."))
        else:
            default = "required" if info.is_required() else f"default {_as_yaml(info.default)}"
            choices = " | ".join(str(choice) for choice in get_args(info.annotation) if isinstance(choice, str))
            description = info.description or ""
            if info.default is None and "null: " in description:  # already there, with what it means
                description, default = description.replace("null: ", "default null: "), ""
            keys[f"{prefix}{name}"] = "; ".join(filter(None, (choices, description, default)))
    return keys
