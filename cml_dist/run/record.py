"""One start of a run, for the record and for people: versions, hardware, parameters, data."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from dataclasses import asdict
from typing import Any

import torch

from cml_dist import __version__
from cml_dist.config.methods import noise_warning
from cml_dist.config.plan import plan_rows
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.env import idle_nodes
from cml_dist.distributed.world import World
from cml_dist.meta.rule import part_of
from cml_dist.run.assemble import Parts
from cml_dist.run.status import now, this_start
from cml_dist.telemetry.console import Console

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "numpy", "safetensors", "pillow")


def session_record(parts: Parts, world: World, step: int) -> dict[str, Any]:
    """What a line of ``sessions.jsonl`` holds."""
    counts: dict[str, int] = {}
    for name, value in parts.net.named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + value.numel()
    gpu = world.device.type == "cuda"
    return {
        "time": now(),
        "step": step,
        **asdict(this_start()),
        "versions": versions(),
        "hardware": torch.cuda.get_device_name(world.device) if gpu else f"CPU ({platform.machine()})",
        "threads": parts.threads,
        "parameters": counts,
        "plan": parts.plan.as_dict(),
        "data": parts.domain.describe(),
    }


def announce(console: Console, config: RunConfig, parts: Parts, record: dict[str, Any]) -> None:
    """Show what will happen, and warn of what may be meant otherwise."""
    rows = {**plan_rows(config, parts.plan), **session_rows(record), **set_rows(parts)}
    console.header("cml-dist train", rows)
    for warning in (set_warning(config, parts), noise_warning(config), idle_nodes()):
        if warning is not None:
            console.warn(warning)


def session_rows(record: dict[str, Any]) -> dict[str, str]:
    """The record in words, for the header."""
    rows = {
        "parameters": ", ".join(f"{part} {count:,}" for part, count in record["parameters"].items()),
        "hardware": f"{record['hardware']}, {record['threads']} CPU thread{'s' * (record['threads'] != 1)} a process",
    }
    for split, info in record["data"].get("splits", {}).items():
        kept = "in memory of each process" if info["kept"] == "memory" else "streamed (each checked when drawn)"
        rows[f"{split} split"] = (
            f"{info['images']:,} images of {info['classes']:,} classes, {info['bytes'] / 2**20:.0f} MiB {kept}"
        )
    return rows


def set_rows(parts: Parts) -> dict[str, str]:
    """Which image set it is; empty for other domains."""
    data = parts.domain.describe()
    if "name" not in data:
        return {}
    channels, height, width = data["input_shape"]
    return {"image set": f"{data['name']} in {data['root']}, {width}x{height} px, {'grey' if channels == 1 else 'RGB'}"}


def set_warning(config: RunConfig, parts: Parts) -> str | None:
    """Where ``domain.name`` is a known set, and the one in ``domain.root`` calls itself something else."""
    name, packed = config.domain.name, parts.domain.describe().get("name")
    if packed is None or name in ("glyphs", "images") or _letters(name) in _letters(packed):
        return None
    return (
        f"domain.name is {name}, but the set in {config.domain.root} is called {packed}; "
        f"if it is meant, say domain.name=images, or pack it with --name {name}"
    )


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version(), "cml_dist": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
