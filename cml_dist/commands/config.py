"""``cml-dist config``: what a configuration means, and every setting there is."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import textwrap
from typing import TYPE_CHECKING

from cml_dist.errors import CmlError

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console

LINE = 60
"""Characters of a setting's meaning where several are listed."""


def config(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.config.keys import annotated
    from cml_dist.config.load import find_recipe, layered, parse_config, read_recipe
    from cml_dist.config.methods import unlabelled_steps
    from cml_dist.config.plan import make_plan, plan_rows
    from cml_dist.config.shape import open_keys
    from cml_dist.distributed.deepspeed import deepspeed_config, zero_stage
    from cml_dist.distributed.env import TORCH_DEFAULTS, launched

    if args.keys is not None:
        _keys(args.keys, console)
        return
    if args.config is None:
        raise CmlError("no configuration was named", "cml-dist config CONFIG, or cml-dist config --keys")
    recipe = find_recipe(args.config)
    layers = layered(read_recipe(recipe, console.warn), args.overrides, console.warn, args.preset)
    config = parse_config(layers.data, source=args.config)
    sources = layers.sources
    asked = config
    if left := [f"domain.{key}" for key in open_keys(config)]:
        from cml_dist.data.set_shape import is_here, known_shape

        config, there = known_shape(config), is_here(config)
        asked = config if there else asked
        sources = {**sources, **dict.fromkeys(left, "the set in domain.root" + ", which is not here" * (not there))}
    processes = config.parallel.processes or launched().size  # asked for, else launched, else one
    plan = make_plan(config, processes, os.environ)
    if zero_stage(plan.strategy) is not None or args.deepspeed:
        dictionary = deepspeed_config(config, plan, os.environ)  # also a check of the user's own file
    if args.deepspeed:
        print(json.dumps(dictionary, indent=2))
        return
    rows = {"recipe": str(recipe), **plan_rows(config, plan)}
    if config.engine.name == "auto" and plan.engine == "graph" and plan.inner_steps + unlabelled_steps(config) > 1:
        rows["engine"] += ", or adjoint where memory asks for it (found out at the start)"
    if args.all:
        rows["environment"] = ", ".join(f"{name}={os.environ.get(name)}" for name in TORCH_DEFAULTS)
    if layers.gave_way:
        lost = ", ".join(f"{key}={value}" for key, value in layers.gave_way.items())
        rows["gave way"] = f"of the recipe, to method.name={config.method.name}: {lost}"
    if console.interactive:
        console.header("cml-dist config", rows)
    else:  # the output is a configuration, to be kept in a file
        for name, value in rows.items():
            console.note(f"# {name}: {value}")
    told, rest = annotated(asked, sources)
    print(f"# What differs from the defaults, and where it is from\n{told}")
    if args.all:
        print(f"# Defaults\n{rest}", end="")
    else:
        print(f"# The other {sum(map(bool, rest.splitlines()))} settings are defaults: --all shows them")


def _keys(pattern: str, console: Console) -> None:
    """A table; without a terminal a line each, for grep."""
    from cml_dist.config.keys import matching

    found = matching(pattern)
    if not console.interactive:
        for setting in found:
            console.note(f"{setting.key}  {setting.meaning}")
        return
    if len(found) == 1:
        only = found[0]
        shown = {"default": only.default, "takes": only.takes, "meaning": only.help}
        console.header(only.key, {name: value for name, value in shown.items() if value})
        return
    for _, section in itertools.groupby(found, lambda setting: setting.key.partition(".")[0]):
        rows = [(s.key, s.default, s.takes, textwrap.shorten(s.help, LINE, placeholder=" ...")) for s in section]
        console.table("", ("setting", "default", "takes", "meaning"), rows, least=("takes",))
    console.note("The whole meaning of one: cml-dist config --keys KEY")
