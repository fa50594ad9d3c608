"""From a recipe and ``key=value`` overrides to a checked, frozen :class:`RunConfig`; the only reader of such files.

In between, settings are flat: ``section.key`` -> value.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cml_dist.config import schema
from cml_dist.config.keys import flatten, valid_keys
from cml_dist.config.presets import PRESETS
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError
from cml_dist.registry import DOMAINS, METHODS, NAME_DECIDES, OWN_DOMAIN, family
from cml_dist.user_code import check_named

_PACKAGE = Path(__file__).resolve().parents[1]
_RECIPES = (_PACKAGE / "recipes", _PACKAGE.parent / "configs" / "recipes")
"""Installed (setup.py puts the recipes there), or in a checkout, also an editable one."""

RENAMED: dict[str, tuple[str, dict[str, str]]] = {
    "engine.copies": ("engine.trajectory_device", {}),
    "parallel.silence_s": ("parallel.heartbeat_timeout_s", {}),
    "parallel.timeout_s": ("parallel.hang_timeout_s", {}),
    "run.dtype": ("run.precision", {"float32": "fp32", "float64": "fp64"}),
    "run.compute": ("run.precision", {"dtype": "fp32", "float32": "fp32", "bfloat16": "bf16"}),
}
"""Settings by their names in 0.1, which are read until 0.3: their names now, and the values that changed with them."""

RUN_CONFIG = "config.yaml"
"""Of a run, in its folder."""

MOST_BYTES, MOST_SETTINGS, MOST_DEPTH = 2**20, 10_000, 32
"""Of a configuration: a short YAML file may stand for one that fills the memory."""

Warn = Callable[[str], object]
"""Is told, a line each, of settings that have another name by now."""


def silently(line: str) -> None:
    pass


def load_config(
    path: str, overrides: Sequence[str] = (), warn: Warn = silently, preset: str | None = None
) -> RunConfig:
    """Read a recipe by path or short name and apply a preset of ``PRESETS`` and ``key=value`` overrides.

    The ``config.yaml`` of a run folder means the run in that folder, wherever it was made (:func:`in_folder`).

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest valid one), or a value out of range.
    """
    return parse_config(layered(read_recipe(find_recipe(path), warn), overrides, warn, preset).data, source=str(path))


def read_recipe(recipe: Path, warn: Warn = silently) -> dict[str, Any]:
    """The settings in a YAML file; those of a run folder by :func:`in_folder`."""
    data = read_yaml(recipe)
    if recipe.name == RUN_CONFIG and holds_run(recipe.parent):
        warn(f"{recipe} is that of a run folder: run.dir is {recipe.parent}, and caches are this user's own")
        data = in_folder(data, recipe.parent)
    return data


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder; that of all class splits is one."""
    kept = ("status.json", "sessions.jsonl", "split-000", "checkpoints/step-*.safetensors")
    return any(any(folder.glob(name)) for name in kept)


def in_folder(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A run folder's settings, of which none says where to write: in that folder, and data in the user's cache.

    Who sent the folder has no say in that; another place is given on the command line.
    """
    flat = {key: value for key, value in _renamed(flatten(data)).items() if key != "domain.cache"}
    if flat.get("domain.name") == "glyphs":  # there it is where they are rendered to
        flat.pop("domain.root", None)
    return _nested({**flat, "run.dir": str(folder)})


# --------------------------------------------------------------------------- files


class _Loader(yaml.SafeLoader):
    """YAML without whole numbers to base 60, of which 1.2 knows none either: ``run.profile=2:3`` is no 123."""


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | str:
    return node.value if ":" in node.value else loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def recipes() -> dict[str, Path]:
    """Every shipped recipe by its short name, e.g. ``glyphs``, in order of name."""
    found = ({path.stem: path for path in sorted(place.glob("*.yaml"))} for place in _RECIPES)
    return next(filter(None, found), {})


def find_recipe(name_or_path: str) -> Path:
    """The YAML file of a path, or else of a recipe's short name (``glyphs``, ``glyphs.yaml``, its path in a checkout).

    Raises:
        ConfigError: neither a file nor a recipe; the nearest names are given.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    known, short = recipes(), path.name.removesuffix(".yaml")
    if str(path.parent) in (".", "configs/recipes") and short in known:
        return known[short]
    what = "a folder" if path.is_dir() else "neither a file nor a recipe"
    near = " or ".join(difflib.get_close_matches(short, known, n=3, cutoff=0.5))
    remedy = f"did you mean {near}?" if near else f"give the path of a YAML file, or one of {', '.join(known)}"
    raise ConfigError(f"configuration {name_or_path} is {what}", remedy)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ConfigError(f"{path} is larger than {MOST_BYTES:,} bytes", "start from a file in configs/recipes")
        data = yaml.load(text.decode("utf-8"), _Loader)
        _count(data)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    except ConfigError:
        raise
    except Exception as error:  # PyYAML's constructors raise of many kinds besides its own, RecursionError too
        reason = str(error) if isinstance(error, (yaml.YAMLError, ValueError)) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path} is no valid YAML: {reason[:500]}", "correct the file at that place") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no mapping of sections", "start from a file in configs/recipes")
    return data


def _count(data: Any, depth: int = 0) -> int:
    """How many values there are, anchors followed as everything here follows them; ValueError where too many."""
    parts = [*data.keys(), *data.values()] if isinstance(data, dict) else data if isinstance(data, list) else ()
    if depth > MOST_DEPTH:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
    total = 1
    for part in parts:
        total += _count(part, depth + 1)
        if total > MOST_SETTINGS:
            raise ValueError(f"it has more than {MOST_SETTINGS:,} values")
    return total


# --------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Layers:
    """A configuration before it is checked, put together from its layers.

    Attributes:
        data: nested settings.
        sources: where each ``section.key`` that is not the schema's default is from: ``method NAME``, ``recipe`` or
            ``preset NAME`` or ``command line``.
        gave_way: the recipe's ``method.*`` that another method's name on the command line replaced, with their values.
    """

    data: dict[str, Any]
    sources: dict[str, str]
    gave_way: dict[str, Any]


def layered(
    recipe: Mapping[str, Any], overrides: Sequence[str], warn: Warn = silently, preset: str | None = None
) -> Layers:
    """Schema < the method's published defaults < recipe < preset < command line.

    A recipe's ``method.*`` counts for the method that it names and its family (cml, maml and fomaml are one). Under
    another name that method's own defaults count; within the family what the name decides does.
    """
    if preset and preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}", f"use one of {', '.join(PRESETS)}")
    length = PRESETS[preset] if preset else {}
    given = {**_renamed(flatten(recipe), warn), **length}
    settings, chosen = _assigned(given, overrides, warn)
    then, now = (str(layer.get("method.name", "cml")) for layer in (given, settings))
    defaults: dict[str, Any] = {}
    if now in METHODS:
        sections = {"method": METHODS[now].settings, "optim": METHODS[now].optim}
        defaults = {f"{section}.{key}": value for section, own in sections.items() for key, value in own.items()}
    yields: list[str] = []
    if then != now:
        decided = tuple(f"method.{key}" for key in NAME_DECIDES) if family(then) == family(now) else "method."
        yields = [key for key in settings if key.startswith(decided)]
    gave_way = {key: settings.pop(key) for key in yields if key not in chosen | {"method.name"}}
    colearner = settings.get("method.colearner", defaults.get("method.colearner", False))
    switched = chosen & {"method.name", "method.colearner"} and "method.gamma" not in chosen
    if colearner is False and switched and settings.get("method.gamma"):
        gave_way["method.gamma"] = settings.pop("method.gamma")
    sources = dict.fromkeys(settings, "recipe") | dict.fromkeys(length, f"preset {preset}")
    sources = {key: "command line" if key in chosen else sources[key] for key in settings}
    sources |= {key: f"method {now}" for key in defaults if settings.get(key) is None}  # null asks for it
    return Layers(_nested(settings), sources, gave_way)


def merge(data: Mapping[str, Any], overrides: Iterable[str], warn: Warn = silently) -> dict[str, Any]:
    """``data`` with ``section.key=value`` assignments applied; values are read as YAML."""
    return _nested(_assigned(_renamed(flatten(data)), overrides, warn)[0])


def _assigned(given: Mapping[str, Any], overrides: Iterable[str], warn: Warn) -> tuple[dict[str, Any], set[str]]:
    """Flat settings with overrides applied, and which ones those set: they alone may name code."""
    settings, chosen = dict(given), set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {override!r} is not of the form section.key=value", "write train.steps=1000")
        try:
            value = yaml.load(text, _Loader)
        except Exception as error:  # a tag or a date may raise anything
            raise ConfigError(f"the value of {override!r} is no valid YAML", "quote it for your shell") from error
        for other in list(settings):  # a section that is given as a whole replaces all of it
            if other.startswith(f"{key}.") or key.startswith(f"{other}."):
                del settings[other]
        new = _renamed(flatten({key: value}), warn)
        settings |= new
        chosen |= new.keys()
    check_named(settings, chosen)
    return settings, chosen


def _renamed(settings: Mapping[str, Any], warn: Warn = silently) -> dict[str, Any]:
    """Flat settings by their names of today."""
    settings = dict(settings)
    for old, (new, values) in RENAMED.items():
        if old in settings:
            warn(f"{old} is now {new}; the old name is read until 0.3")
            value = settings.pop(old)
            value = values.get(str(value), value)
            if new not in settings or value != "fp32":  # two old settings became one
                settings[new] = value
    return settings


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        target = data
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[last] = value
    return data


# --------------------------------------------------------------------------- checking and showing


def parse_config(data: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """The checked configuration in plain ``data``; every fault in one ConfigError."""
    try:
        return RunConfig.model_validate(_nested(_renamed(flatten(data))))
    except ValidationError as error:
        faults = list(dict.fromkeys(map(_fault, error.errors())))
        raise ConfigError(
            f"{source}: " + "; ".join(dict.fromkeys(what for what, _ in faults)),
            "; ".join(dict.fromkeys(remedy for _, remedy in faults if remedy)),
        ) from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _fault(error: Mapping[str, Any]) -> tuple[str, str]:
    """(what, remedy) of one pydantic error."""
    location = [str(part) for part in error["loc"]]
    domain = None
    if location[:1] == ["domain"] and location[1:2] and location[1] in (*DOMAINS, schema.OWN):
        domain = location.pop(1)  # the tag of the union, which users never wrote
    if (place := location[-1] if location else "").startswith("literal[") or place.startswith("constrained-"):
        location.pop()  # one of several kinds of value that a setting takes
    key, value, kind = ".".join(location), error.get("input"), error["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, valid_keys(domain), n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else "see cml-dist config --keys"
        return f"{key} is not a setting" + (f" of domain {domain}" if domain else ""), remedy
    if kind == "missing":
        return f"{key} is not set", f"add {key}=..."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name") if isinstance(value, Mapping) else value
        return f"domain.name is {name!r}", f"use one of {', '.join(DOMAINS)}, or {OWN_DOMAIN.help}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        example = next((name for name in valid_keys() if name.startswith(f"{key}.")), f"{key}.NAME")
        return f"{key} is {value!r}, but it is a section", f"set its keys, e.g. {example}=..."
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if key else message, ""
    return f"{key} is {value!r}", (message[:1].lower() + message[1:]).replace("input should", f"{key} should", 1)
