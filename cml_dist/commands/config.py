"""``cml-dist config``: what a configuration means, and every setting there is."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from cml_dist.errors import CmlError

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console


def config(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.config.load import dump_config, load_config, valid_keys
    from cml_dist.config.plan import make_plan, plan_rows
    from cml_dist.parallel.deepspeed_config import deepspeed_config, zero_stage
    from cml_dist.parallel.launched import launched

    if args.keys:
        if console.interactive:
            console.table("Settings", ("key", "meaning"), list(valid_keys().items()))
        else:  # for grep
            for key, meaning in valid_keys().items():
                console.note(f"{key}  {meaning}")
        return
    if args.config is None:
        raise CmlError("no configuration was named", "cml-dist config CONFIG, or cml-dist config --keys")
    config = load_config(args.config, args.overrides)
    plan = make_plan(config, config.parallel.processes or launched().size)  # asked for, else launched, else one
    if zero_stage(plan.strategy) is not None or args.deepspeed:
        dictionary = deepspeed_config(config, plan)  # also a check of the user's own file
    if args.deepspeed:
        print(json.dumps(dictionary, indent=2))
        return
    console.header("cml-dist config", plan_rows(config, plan))
    print(dump_config(config), end="")
