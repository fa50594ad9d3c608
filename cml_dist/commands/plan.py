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
    "host": "host",
    "sent": "sent",
    "total": "total",
}
"""Of a rank's budget, with names short enough for a terminal."""

LEAST = ("host", "buffers", "copies", "params", "grads", "moments", "sent", "activ.")
"""The parts that a narrow screen can do without, the least worth first."""


def plan(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.config.load import load_config
    from cml_dist.config.methods import has_upper_ascent, sub_networks_in_words, unlabelled_steps

    config = load_config(args.config, args.overrides, console.warn, args.preset)
    from cml_dist.memory.forecast import forecast
    from cml_dist.memory.strategies import Strategy
    from cml_dist.telemetry import text

    preset = ["--preset", args.preset] if args.preset else []
    words, images = [args.config, *preset, *args.overrides], {"image_size": args.image_size, "channels": args.channels}
    found = forecast(config, args.gpus, args.gpu_memory_gib, **images, words=words)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    names = [str(Strategy(row["strategy"], row["offload"])) for row in found["rows"]]
    ways, used = {row["by"] for row in found["rows"]}, found["gpus_used"]
    each, steps = found["episodes_per_rank"], config.method.inner_steps
    facts = {
        "model": f"{config.model.backbone}: {found['num_parameters']:,} parameters, "
        f"{found['num_constants']:,} constants",
        "episode": found["episode"],
        "inputs": f"{text.shape_in_words(found['inputs'])} ({found['input_source']})",
        "meta-step": f"{steps} inner step{'s' * (steps != 1)}, "
        + (f"{further} more on unlabelled examples too, " if (further := unlabelled_steps(config)) else "")
        + f"{each} episode{'s' * (each != 1)} a GPU"
        + (", each twice" if has_upper_ascent(config) else "")
        + (f", {sub_networks_in_words(config.method)} besides" if config.method.augment else "")
        + (f", {min(ways)}" if len(ways) == 1 else ""),
        "GPUs": f"{used} of {args.gpu_memory_gib:g} GiB, of which {found['usable_gib']:.4g} GiB may be used",
    }
    console.header("cml-dist plan", facts)
    if found["warning"] is not None:
        console.warn(found["warning"])
    if idle := found["without_episode"]:
        batch = config.train.episodes_per_step
        do = "would have nothing to do" if used < args.gpus else "only hold their part of the state"
        console.warn(
            f"A meta-step has {batch} episode{'s' * (batch != 1)} (train.episodes_per_step): {idle} of {args.gpus} "
            f"GPUs {do}; train.episodes_per_step={args.gpus} would use them all"
        )
    unit, size = ("GiB", 2**30) if max(row["total"] for row in found["rows"]) >= 10 * 2**30 else ("MiB", 2**20)
    parts = {head: part for head, part in COLUMNS.items() if any(row[part] for row in found["rows"])}
    rows = [
        (name, *(text.amount(row[part] / size) for part in parts.values()), "yes" if row["fits"] else "no", row["by"])
        for name, row in zip(names, found["rows"], strict=True)
    ]
    last = -1 if len(ways) == 1 else None
    title = f"{unit} of each GPU at its largest moment" + (", and sent in a meta-step" if "sent" in parts else "")
    columns = ("strategy", *parts, "fits", "meta-gradient by")[:last]
    console.table(title, columns, [row[:last] for row in rows], least=LEAST)
    console.note("copies: what adapts, of the inner steps; activ.: of second order; moments: with the master copy")
    console.note("Not counted: CUDA context, kernels' workspaces, NCCL, the allocator's slack (0.5 to 2 GiB in all)")
    if found["command"] is None:
        console.note("Nothing fits. What would:")
        for change in found["changes"]:
            console.note(f"  - {change}")
        return
    small, best = found["smallest"], found["recommended"]
    smallest = _on(Strategy(small["strategy"], small["offload"]), small["gpus"], small["by"])
    recommended = _on(names[best], used, found["rows"][best]["by"])
    if smallest != recommended:
        console.note(f"Smallest that fits: {smallest}")
    console.note(f"Recommended: {recommended}" + ", the smallest that fits" * (smallest == recommended))
    print(found["command"])


def _on(strategy: object, gpus: int, by: str) -> str:
    return f"{strategy} on {gpus} GPU{'s' * (gpus != 1)}, {by}"
