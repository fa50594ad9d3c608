"""``cml-dist config``: what a configuration means, and every setting there is."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from cml_dist.errors import CmlError

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console


def config(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.config.load import annotated, find_recipe, layered, parse_config, read_yaml, valid_keys
    from cml_dist.config.plan import make_plan, plan_rows
    from cml_dist.config.shape import open_keys
    from cml_dist.distributed.deepspeed import deepspeed_config, zero_stage
    from cml_dist.distributed.env import TORCH_DEFAULTS, launched

    if args.keys:
        if console.interactive:
            console.table("Settings", ("key", "meaning"), list(valid_keys().items()))
        else:  # for grep
            for key, meaning in valid_keys().items():
                console.note(f"{key}  {meaning}")
        return
    if args.config is None:
        raise CmlError("no configuration was named", "cml-dist config CONFIG, or cml-dist config --keys")
    layers = layered(read_yaml(find_recipe(args.config)), args.overrides, console.warn, args.preset)
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
    rows = plan_rows(config, plan)
    if config.engine.name == "auto" and plan.engine == "graph" and plan.inner_steps > 1:
        rows["engine"] += ", or adjoint where memory asks for it (found out at the start)"
    rows["environment"] = ", ".join(f"{name}={os.environ.get(name)}" for name in TORCH_DEFAULTS)
    console.header("cml-dist config", rows)
    if layers.gave_way:
        lost = ", ".join(f"{key}={value}" for key, value in layers.gave_way.items())
        console.note(f"Of the recipe gave way to method.name={config.method.name}: {lost}")
    print("# Settings with their source; those without one are defaults.")
    print(annotated(asked, sources), end="")
