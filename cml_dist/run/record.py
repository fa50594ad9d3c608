"""One start of a run, for the record and for people: versions, hardware, parameters, data."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cml_dist import __version__
from cml_dist.config.methods import noise_warning
from cml_dist.config.plan import plan_rows
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.env import idle_nodes, launched, this_start
from cml_dist.distributed.world import World, crowded_cores
from cml_dist.meta.rule import part_of
from cml_dist.run.assemble import Parts
from cml_dist.run.status import now
from cml_dist.telemetry.console import Console

KEPT = {
    "memory": "in memory of each process", "streamed": "streamed (each checked when drawn)",
    "features": "of features that are kept",
}  # fmt: skip
"""How a split's images are at hand, in words."""

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
        "commit": code_commit() if world.is_main else None,
        "hardware": torch.cuda.get_device_name(world.device) if gpu else f"CPU ({platform.machine()})",
        "threads": parts.threads,
        "parameters": counts,
        "plan": parts.plan.as_dict(),
        "data": parts.domain.describe(),
        **({} if parts.taken_over is None else {"taken_over": parts.taken_over}),
    }


def announce(console: Console, config: RunConfig, parts: Parts, record: dict[str, Any]) -> None:
    """Show what will happen, and warn of what may be meant otherwise."""
    data, rows = record["data"], plan_rows(config, parts.plan)
    rows["parameters"] = ", ".join(f"{part} {count:,}" for part, count in record["parameters"].items())
    rows["hardware"] = f"{record['hardware']}, {record['threads']} CPU threads a process"
    for split, info in data.get("splits", {}).items():
        kept = KEPT[info["kept"]]
        size = f"{info['images']:,} images of {info['classes']:,} classes, {info['bytes'] / 2**20:.0f} MiB"
        rows[f"{split} split"] = f"{size} {kept}"
    if "name" in data:
        shape = " x ".join(map(str, data["input_shape"]))
        packed = f" (packed at {' x '.join(map(str, data['packed_size']))})" if "packed_size" in data else ""
        rows["image set"] = f"{data['name']} in {data['root']}, {shape}{packed}"
    rows |= {key: data[key] for key in ("graph", "classes") if key in data}
    console.header("cml-dist train", rows)
    if parts.taken_over is not None:
        console.header("Started from an earlier run", parts.taken_over)
    crowded = crowded_cores(record["threads"], launched().local_size)
    border = getattr(parts.net.body, "border_warning", None)
    for warning in (noise_warning(config), border, idle_nodes(), crowded):
        if warning is not None:
            console.warn(warning)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version(), "cml_dist": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def code_commit() -> str | None:
    """The commit of the code that runs, with ``-dirty`` where it was changed since; None where nobody knows."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / ".git").exists():
        git = ["git", "--no-optional-locks", "-C", str(checkout)]
        with suppress(OSError, subprocess.SubprocessError):
            asked = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    with suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):  # pip install git+...
        told = importlib.metadata.distribution("cml-dist").read_text("direct_url.json")
        return str(json.loads(told)["vcs_info"]["commit_id"])
    return None
