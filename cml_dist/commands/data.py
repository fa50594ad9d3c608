"""``cml-dist data pack`` and ``cml-dist data inspect``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cml_dist.telemetry.console import Console


def pack(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.config.load import recipes
    from cml_dist.data.base import SPLITS
    from cml_dist.telemetry.console import preparing
    from cml_dist.tools.inspect import GROUP_COLUMNS, group_cells
    from cml_dist.tools.pack import pack as packed
    from cml_dist.tools.sources.known_splits import known_sets
    from cml_dist.tools.sources.tree import Limits

    options = ("download", "layout", "splits", "split_seed", "image_size", "channels", "name", "min_images", "group_by",
               "strict")  # fmt: skip
    limits = Limits(member_mib=args.max_member_mib, pixels=args.max_pixels, files=args.max_files)
    with preparing(console) as progress:
        given = {name: getattr(args, name) for name in options}
        made = packed(args.source, args.dest, **given, limits=limits, progress=progress)
    shards = made.shards
    height, width = shards.image_size
    kind = "grey" if shards.channels == 1 else "RGB"
    rows = [
        (split, len(shards.split_info(split).classes), shards.num_images(split), *group_cells(shards, split))
        for split in shards.splits
    ]
    columns = ("split", "classes", "images", *(GROUP_COLUMNS if args.group_by is not None else ()))
    console.table(f"{shards.name} ({made.layout}), {width}x{height} px, {kind}", columns, rows)
    size_mib = sum(file.size for file in shards.info.shards) / 2**20
    console.note(
        f"Packed {len(shards):,} images, {size_mib:.1f} MiB, into {args.dest} "
        f"({made.num_kept:,} kept byte for byte, {len(shards) - made.num_kept:,} converted)"
    )
    if about := known_sets().get(made.known):
        console.note(f"Recognised as {about.title}: split {'/'.join(map(str, about.classes))} by {about.source}")
    for line in made.chosen:
        console.note(line)
    for warning in made.warnings:
        console.warn(warning)
    met = sum(account.files for account in made.accounts)
    console.table("What became of the files", ("files", "what", "e.g."), [
        *((account.files, account.what, account.example) for account in made.accounts), (met, "met in all", ""),
    ], least=("e.g.",))  # fmt: skip
    dest, recipe = shlex.quote(args.dest), made.known if made.known in recipes() else "my_images"
    console.command("Look at it:", f"cml-dist data inspect {dest}")
    if shards.splits == SPLITS:
        run_dir = shlex.quote(f"runs/{Path(args.dest).name}")
        console.command("Train on it:", f"cml-dist train {recipe} domain.root={dest} run.dir={run_dir}")


def inspect(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.data.shards import ShardSet
    from cml_dist.errors import ConfigError
    from cml_dist.telemetry.console import preparing
    from cml_dist.tools.inspect import COLUMNS, GROUP_COLUMNS, draw_contact_sheet, group_cells, split_rows

    for name in ("ways", "shots", "episodes"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} is {getattr(args, name)}", f"give 1 or more: --{name} 1")
    with preparing(console) as progress:
        root = args.dir
        if root == "glyphs":
            from cml_dist.data.glyphs import ensure_glyphs

            root = str(ensure_glyphs(progress=progress))
        shards = ShardSet.open(root, progress=progress)
        if args.verify:
            shards.verify(progress)
    info = shards.info
    height, width = info.image_size
    kind = "grey" if info.channels == 1 else "RGB"
    title = f"{info.name}, {width}x{height} px, {kind} (min, median, max: images a class)"
    console.table(title, COLUMNS, split_rows(shards), least=("shards", "median"))
    if info.group_by is not None:
        title = f"Groups by '{info.group_by}': none has images in both support and query set of an episode"
        rows = [(split, *group_cells(shards, split)) for split in shards.splits]
        console.table(title, ("split", *GROUP_COLUMNS), rows)
    if info.mean and info.std:
        means, stds = (", ".join(f"{x:.4f}" for x in values) for values in (info.mean, info.std))
        console.note(f"mean {means}; std {stds} (pixels in 0..1, train split)")
    if args.verify:
        console.note("All checksums agree")
    shown = draw_contact_sheet(shards, Path(args.sheet), ways=args.ways, shots=args.shots, episodes=args.episodes)
    console.note(f"Contact sheet: {args.sheet} ({shown})")
