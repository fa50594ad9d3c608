"""One start of a run, for the record and for people: versions, hardware, parameters, data."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from typing import Any

import torch

from cml_dist.config.plan import RunPlan
from cml_dist.meta.problem import part_of
from cml_dist.parallel.world import World
from cml_dist.run.assemble import Parts

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "numpy", "safetensors", "pillow")


def session_record(plan: RunPlan, parts: Parts, world: World, threads: int, step: int) -> dict[str, Any]:
    """What a line of ``sessions.jsonl`` holds."""
    counts: dict[str, int] = {}
    for name, value in parts.net.named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + value.numel()
    gpu = world.device.type == "cuda"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "versions": versions(),
        "hardware": torch.cuda.get_device_name(world.device) if gpu else f"CPU ({platform.machine()})",
        "threads": threads,
        "parameters": counts,
        "plan": plan.as_dict(),
        "data": parts.domain.describe(),
    }


def session_rows(record: dict[str, Any]) -> dict[str, str]:
    """The record in words, for the header."""
    rows = {
        "parameters": ", ".join(f"{part} {count:,}" for part, count in record["parameters"].items()),
        "hardware": f"{record['hardware']}, {record['threads']} CPU thread{'s' * (record['threads'] != 1)} a process",
    }
    for split, info in record["data"].get("splits", {}).items():
        kept = "in memory" if info["kept"] == "memory" else "streamed from disk"
        rows[f"{split} split"] = (
            f"{info['images']:,} images of {info['classes']:,} classes, {info['bytes'] / 2**20:.0f} MiB {kept}"
        )
    return rows


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version(), "cml_dist": importlib.metadata.version("cml-dist")}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
