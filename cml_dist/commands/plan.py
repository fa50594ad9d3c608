"""``cml-dist plan``: the forecast as a table."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console

COLUMNS = {
    "params": "parameters",
    "grads": "gradients",
    "moments": "moments",
    "copies": "adapted",
    "activ.": "activations",
    "buffers": "buffers",
    "total": "total",
    "host": "host",
    "sent": "sent",
}
"""Of a rank's budget, with names short enough for a terminal."""


def plan(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.config.load import load_config
    from cml_dist.config.methods import has_upper_ascent

    config = load_config(args.config, args.overrides, console.warn, args.preset)
    from cml_dist.memory.forecast import forecast
    from cml_dist.memory.strategies import Strategy

    preset = ["--preset", args.preset] if args.preset else []
    words, images = [args.config, *preset, *args.overrides], {"image_size": args.image_size, "channels": args.channels}
    found = forecast(config, args.gpus, args.gpu_memory_gib, **images, words=words)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    names = [str(Strategy(row["strategy"], row["offload"])) for row in found["rows"]]
    ways = {row["by"] for row in found["rows"]}
    facts = {
        "model": f"{config.model.backbone}: {found['num_parameters']:,} parameters, "
        f"{found['num_constants']:,} constants",
        "episode": found["episode"],
        "inputs": f"{'x'.join(map(str, found['inputs']))} ({found['input_source']})",
        "meta-step": f"inner steps: {config.method.inner_steps}; episodes a rank: {found['episodes_per_rank']}"
        + (", each twice" if has_upper_ascent(config) else "")
        + (f"; {min(ways)}" if len(ways) == 1 else ""),
        "GPUs": f"{args.gpus} of {args.gpu_memory_gib:g} GiB, of which {found['usable_gib']:.4g} GiB may be used",
    }
    console.header("cml-dist plan", facts)
    if found["warning"] is not None:
        console.warn(found["warning"])
    rows = [
        (name, *(f"{row[part] / 2**30:.2f}" for part in COLUMNS.values()), "yes" if row["fits"] else "no", row["by"])
        for name, row in zip(names, found["rows"], strict=True)
    ]
    last = -1 if len(ways) == 1 else None
    columns = ("strategy", *COLUMNS, "fits", "meta-gradient by")[:last]
    title = "GiB of each rank at its largest moment, and sent in a meta-step"
    console.table(title, columns, [row[:last] for row in rows])
    console.note(
        "Copies: adapted parameters of the inner steps. Activations are of second order, moments with the master copy; "
        "host: on the CPU by offloading. Not counted: CUDA context, kernels' workspaces, NCCL, the allocator's slack"
    )
    if found["command"] is None:
        console.note(f"Nothing fits: the leanest strategy needs GPUs of {found['smallest_gib']:.3g} GiB")
    else:
        console.note(f"Recommended: {names[found['recommended']]}")
        print(found["command"])
