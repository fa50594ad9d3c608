"""``cml-dist plan``: the forecast as a table."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console


PARTS = ("parameters", "gradients", "moments", "adapted", "activations", "buffers", "total", "host", "sent")
"""Of a rank's budget, a column each."""
SHORT = {"parameters": "params", "gradients": "grads", "adapted": "copies", "activations": "activ."}
"""Names short enough for a table on a terminal."""


def plan(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.config.load import load_config

    config = load_config(args.config, args.overrides, console.warn)
    from cml_dist.memory.forecast import forecast
    from cml_dist.memory.strategies import Strategy

    found = forecast(
        config,
        args.gpus,
        args.gpu_memory_gib,
        image_size=args.image_size,
        channels=args.channels,
        words=[args.config, *args.overrides],
    )
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    named = [str(Strategy(row.strategy, row.offload)) for row in found.rows]
    console.header(
        "cml-dist plan",
        {
            "model": f"{config.model.backbone}: {found.num_parameters:,} parameters, {found.num_constants:,} constants",
            "inputs": f"{'x'.join(map(str, found.inputs))} ({found.input_source})",
            "meta-step": f"inner steps: {config.method.inner_steps}; episodes a rank: {found.episodes_per_rank}"
            + (f"; {found.means[0]}" if len(set(found.means)) == 1 else ""),
            "GPUs": f"{found.gpus} of {found.gpu_memory_gib:g} GiB, of which {found.usable_gib:.4g} GiB may be used",
        },
    )

    alike = len(set(found.means)) == 1
    rows = [
        (
            named[number],
            *(f"{getattr(row, part) / 2**30:.2f}" for part in PARTS),
            "yes" if found.fits(row) else "no",
            *([] if alike else [str(found.means[number])]),
        )
        for number, row in enumerate(found.rows)
    ]
    columns = ("strategy", *(SHORT.get(part, part) for part in PARTS), "fits", *([] if alike else ["meta-gradient by"]))
    console.table("GiB of each rank at its largest moment, and sent in a meta-step", columns, rows)
    console.note(
        "Copies: adapted parameters of the inner steps. Activations are of second order, moments with the master copy; "
        "host: on the CPU by offloading. Not counted: CUDA context, kernels' workspaces, NCCL, the allocator's slack"
    )
    if found.command is None:
        console.note(f"Nothing fits: the leanest strategy needs GPUs of {found.smallest_gib:.3g} GiB")
    else:
        console.note(f"Recommended: {named[found.recommended]}")
        print(found.command)
