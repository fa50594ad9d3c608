"""From a recipe and ``key=value`` overrides to a checked, frozen :class:`RunConfig`; the only reader of such files."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cml_dist.config import schema
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError
from cml_dist.registry import DOMAINS, METHODS, NAME_DECIDES, family

_PACKAGE = Path(__file__).resolve().parents[1]
_RECIPES = (_PACKAGE / "recipes", _PACKAGE.parent / "configs" / "recipes")
"""Installed (setup.py puts the recipes there), or in a checkout, also an editable one."""

RENAMED = {
    "engine.copies": "engine.trajectory_device",
    "parallel.silence_s": "parallel.heartbeat_timeout_s",
    "parallel.timeout_s": "parallel.hang_timeout_s",
    "run.dtype": "run.precision",
    "run.compute": "run.precision",
}
"""Settings by their names in 0.1, which are read until 0.3."""

_VALUES = {
    "run.dtype": {"float32": "fp32", "float64": "fp64"},
    "run.compute": {"dtype": "fp32", "float32": "fp32", "bfloat16": "bf16"},
}


def load_config(
    path: str, overrides: Sequence[str] = (), warn: Callable[[str], object] = lambda line: None
) -> RunConfig:
    """Read a recipe by path or short name and apply ``key=value`` overrides.

    Args:
        warn: told, a line each, of settings that have another name by now.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid one), or a value out of range.
    """
    return parse_config(load_layers(path, overrides, warn).data, source=str(path))


def load_layers(path: str, overrides: Sequence[str], warn: Callable[[str], object]) -> Layers:
    """As :func:`load_config`, before it is checked."""
    recipe = read_yaml(find_recipe(path))
    for line in old_names(recipe, overrides):
        warn(line)
    return layered(recipe, overrides)


# --------------------------------------------------------------------------- files


def recipes() -> dict[str, Path]:
    """Every shipped recipe by its short name, e.g. ``glyphs``, in order of name."""
    found = ({path.stem: path for path in sorted(place.glob("*.yaml"))} for place in _RECIPES)
    return next(filter(None, found), {})


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe.

    Args:
        name_or_path: the path of a YAML file, or the short name of a recipe (``glyphs``, also ``glyphs.yaml``, or the
            path that it has in a checkout). A file of that name in the current folder wins.

    Raises:
        ConfigError: neither a file nor a recipe; the nearest names are given.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    known = recipes()
    short = path.name.removesuffix(".yaml")
    if str(path.parent) in (".", "configs/recipes") and short in known:
        return known[short]
    what = f"{name_or_path} is a folder" if path.is_dir() else f"{name_or_path} is neither a file nor a recipe"
    near = difflib.get_close_matches(short, known, n=3, cutoff=0.5)
    remedy = (
        f"did you mean {' or '.join(near)}?" if near else f"give the path of a YAML file, or one of {', '.join(known)}"
    )
    raise ConfigError(f"configuration {what}", remedy)


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


# --------------------------------------------------------------------------- layers


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
    given = flatten(_with_new_names(recipe))
    chosen = {RENAMED.get(key, key) for key in (override.partition("=")[0] for override in overrides)}
    section = data.get("method")
    gave_way: dict[str, Any] = {}
    sources: dict[str, str] = {}
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
    for key, value in flatten(data).items():
        if value is None and key in sources:
            continue  # asked for what the method says
        if key in chosen or any(key.startswith(f"{section_key}.") for section_key in chosen):
            sources[key] = "command line"
        elif key in given:
            sources[key] = "recipe"
    return Layers(data, sources, gave_way)


def merge(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``data`` with ``section.key=value`` assignments applied; values are read as YAML."""
    merged = _with_new_names(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        key, text = RENAMED.get(key, key), str(_VALUES.get(key, {}).get(text, text))
        *sections, last = key.split(".")
        if not equals or not all((*sections, last)):
            raise ConfigError(
                f"override {override!r} is not of the form section.key=value", "write e.g. train.steps=1000"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {override!r} is no valid YAML", "quote it for your shell") from error
        target = merged
        for depth, section in enumerate(sections, start=1):
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                whole = ".".join(sections[:depth])
                raise ConfigError(f"override {override!r}: {whole} is a value, not a section", f"set it: {whole}=...")
        if isinstance(target.get(last), dict) and not isinstance(value, dict):
            raise ConfigError(f"override {override!r}: {key} is a section", f"set one of its keys, {_example(key)}")
        target[last] = value
    return merged


def old_names(recipe: Mapping[str, Any], overrides: Iterable[str]) -> list[str]:
    """A line for each setting that is given by the name that it had in 0.1."""
    given = {*flatten(recipe), *(override.partition("=")[0] for override in overrides)}
    return [f"{key} is now {new}; the old name is read until 0.3" for key, new in RENAMED.items() if key in given]


def _with_new_names(data: Mapping[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(dict(data))
    for key, new in RENAMED.items():
        section, _, name = key.partition(".")
        settings = data.get(section)
        if isinstance(settings, dict) and name in settings:
            value, new_name = settings.pop(name), new.partition(".")[2]
            value = _VALUES.get(key, {}).get(value, value)
            if new_name not in settings or value != "fp32":  # two old settings became one
                settings[new_name] = value
    return data


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as ``section.key`` -> value."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# --------------------------------------------------------------------------- checking and showing


def parse_config(data: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """The checked configuration in plain ``data``; every fault in one ConfigError."""
    try:
        return RunConfig.model_validate(_with_new_names(data))
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

    def lines(data: Mapping[str, Any], prefix: str, indent: str) -> Iterable[str]:
        for key, value in data.items():
            if isinstance(value, Mapping) and value:
                yield f"{indent}{key}:"
                yield from lines(value, f"{prefix}{key}.", f"{indent}  ")
                continue
            text = yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]
            source = sources.get(f"{prefix}{key}")
            yield f"{indent}{key}: {text}" + (f"  # {source}" if source else "")

    return "\n".join(lines(config.model_dump(mode="json"), "", "")) + "\n"


def _fault(error: Mapping[str, Any]) -> tuple[str, str]:
    """(what, remedy) of one pydantic error."""
    location = [str(part) for part in error["loc"]]
    domain = None
    if location[:1] == ["domain"] and location[1:2] and location[1] in DOMAINS:
        domain = location.pop(1)  # the tag of the union, which users never wrote
    key, value = ".".join(location), error.get("input")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, valid_keys(domain), n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else "see cml-dist config --keys"
        return f"{key} is not a setting" + (f" of domain {domain}" if domain else ""), remedy
    if error["type"] == "missing":
        return f"{key} is not set", f"add {key}=..."
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name") if isinstance(value, Mapping) else value
        return f"domain.name is {name!r}", f"use one of {', '.join(DOMAINS)}"
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} is {value!r}, but it is a section", f"set its keys, {_example(key)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message, ""
    return f"{key} is {value!r}", (message[:1].lower() + message[1:]).replace("input should", f"{key} should", 1)


def _example(section: str) -> str:
    """A key of a section, for a remedy."""
    return f"e.g. {next(key for key in valid_keys() if key.startswith(f'{section}.'))}=..."


def valid_keys(domain: str | None = None) -> dict[str, str]:
    """Every setting as ``section.key`` -> its description, with those of one domain (default: of all)."""
    keys = {"domain.name": " | ".join(DOMAINS) + "; required"}
    for name, entry in DOMAINS.items():
        if domain in (None, name):
            for key, meaning in _keys(getattr(schema, entry.settings), "domain.").items():
                keys.setdefault(key, meaning)  # shots of images and of curves: the first says it
    for name, info in RunConfig.model_fields.items():
        if name != "domain":
            keys.update(_keys(info.annotation, f"{name}."))
    return keys


def _keys(model: Any, prefix: str) -> dict[str, str]:
    keys: dict[str, str] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys.update(_keys(info.annotation, f"{prefix}{name}."))
            continue
        default = "required" if info.is_required() else f"default {_as_yaml(info.default)}"
        choices = " | ".join(str(choice) for choice in get_args(info.annotation) if isinstance(choice, str))
        description = info.description or ""
        if info.default is None and "null: " in description:  # already there, with what it means
            description, default = description.replace("null: ", "default null: "), ""
        keys[f"{prefix}{name}"] = "; ".join(filter(None, (choices, description, default)))
    return keys


def _as_yaml(value: Any) -> str:
    """A value as one would write it in an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)
