"""``cml-dist data pack`` and ``cml-dist data inspect``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console


def data(args: argparse.Namespace, console: Console) -> None:
    (_pack if args.data_command == "pack" else _inspect)(args, console)


def _pack(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.telemetry.console import preparing
    from cml_dist.tools.pack import pack

    with preparing(console) as progress:
        made = pack(
            args.source,
            args.dest,
            layout=args.layout,
            splits=args.splits,
            image_size=args.image_size,
            channels=args.channels,
            name=args.name,
            progress=progress,
        )
    height, width = made.image_size
    rows = [(split, classes, made.num_images[split]) for split, classes in made.num_classes.items()]
    console.table(f"{made.name} ({made.layout}), {width}x{height} px", ("split", "classes", "images"), rows)
    console.note(
        f"Packed {sum(made.num_images.values()):,} images, {made.size_bytes / 2**20:.1f} MiB, into {made.dest} "
        f"({made.num_kept:,} kept byte for byte, {made.num_converted:,} converted)"
    )
    console.note(f"Look at it: cml-dist data inspect {made.dest}")


def _inspect(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.telemetry.console import preparing
    from cml_dist.tools.inspect import inspect

    with preparing(console) as progress:
        root = args.dir
        if root == "glyphs":
            from cml_dist.domains.glyphs import ensure_glyphs

            root = str(ensure_glyphs(progress=progress))
        found = inspect(
            root,
            sheet=args.sheet,
            ways=args.ways,
            shots=args.shots,
            episodes=args.episodes,
            verify=args.verify,
            progress=progress,
        )
    columns = ("split", "classes", "images", "min", "median", "max", "shards", "MiB")
    rows = [
        (r.split, r.num_classes, r.num_images, r.min_per_class, r.median_per_class, r.max_per_class, r.num_shards)
        + (round(r.size_mib, 1),)
        for r in found.rows
    ]
    height, width = found.image_size
    kind = "grey" if found.channels == 1 else "RGB"
    console.table(f"{found.name}, {width}x{height} px, {kind} (min, median, max: images a class)", columns, rows)
    if found.mean and found.std:
        means, stds = (", ".join(f"{x:.4f}" for x in values) for values in (found.mean, found.std))
        console.note(f"mean {means}; std {stds} (pixels in 0..1, train split)")
    if args.verify:
        console.note("All checksums agree")
    if found.sheet_note:
        console.note(found.sheet_note)
    console.note(f"Contact sheet: {found.sheet}")
