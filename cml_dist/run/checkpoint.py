"""Checkpoints: one file each, whole or not there, independent of strategy and world size.

``checkpoints/step-00000500.safetensors`` holds ``param/<canonical name>`` and ``moment/<key>/<canonical name>``; its
metadata the step, the run's state, and a SHA-256 of all tensors, which loading verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cml_dist.domains.publish import fsync
from cml_dist.errors import CheckpointError
from cml_dist.types import Params

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})\.safetensors")


class DamagedCheckpoint(CheckpointError):
    """Missing, truncated or altered: an older one may do."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on.

    Attributes:
        step: meta-steps done.
        params: psi, theta and phi by canonical name.
        moments: the optimizer's state as ``key/canonical name``.
        state: small JSON values: the best validation so far, counters.
    """

    step: int
    params: Params
    moments: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m.group(1)) for m in map(_NAME.fullmatch, os.listdir(folder)) if m)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint under a temporary name, sync it, and rename it: a reader sees all of it or nothing.

    Raises:
        CheckpointError: the file system refused (full, read-only); older checkpoints are untouched.
    """
    target = path_of(folder, checkpoint.step)
    temporary = target.with_name(f".{target.name}.writing")
    tensors = {f"param/{n}": p for n, p in checkpoint.params.items()}
    tensors |= {f"moment/{n}": m for n, m in checkpoint.moments.items()}
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    meta = {"format": FORMAT, "step": checkpoint.step, "state": checkpoint.state}
    meta["sha256"] = _digest(tensors, meta)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"cml_dist": json.dumps(meta)})
        fsync(temporary)
        os.replace(temporary, target)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        last = steps_in(folder)
        kept = f"the checkpoint of step {last[-1]} stays good" if last else "there is no earlier checkpoint"
        raise CheckpointError(
            f"cannot save {target}: {reason} ({kept})",
            "free space or mend the folder's permissions, then run the same command",
        ) from error
    return target


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        DamagedCheckpoint: missing, truncated or altered.
        CheckpointError: of another format, or under the name of another step.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["cml_dist"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(
            f"checkpoint {path} is missing or damaged ({error})", "delete it; an older one is used"
        ) from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {meta.get('format')}, this version reads {FORMAT}",
            "use the version that wrote it",
        )
    if meta.pop("sha256", None) != _digest(tensors, meta):
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged (its contents do not match their SHA-256)", "delete it; an older one is used"
        )
    if path.name != path_of(path.parent, meta["step"]).name:
        raise CheckpointError(
            f"{path} holds step {meta['step']}", f"rename it to {path_of(path.parent, meta['step']).name}"
        )
    split: dict[str, dict[str, Tensor]] = {"param": {}, "moment": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        split[kind][rest] = tensor
    return Checkpoint(meta["step"], split["param"], split["moment"], meta["state"])


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that is whole, and the faults of the newer ones that are not.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    faults: list[CheckpointError] = []
    for step in reversed(steps_in(folder)):
        try:
            return load(path_of(folder, step)), faults
        except DamagedCheckpoint as error:
            faults.append(error)
    if faults:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {faults[0].what}", "restore one, or start in a new run.dir"
        )
    return None, faults


def set_aside(folder: Path, after: int) -> None:
    """Rename the checkpoints after a step, which were found damaged: none may count as one of the newest."""
    for step in steps_in(folder):
        if step > after:
            path = path_of(folder, step)
            os.replace(path, path.with_name(f"{path.name}.damaged"))


def prune(folder: Path, keep_last: int, keep: frozenset[int]) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and those of the steps in ``keep``."""
    for step in steps_in(folder)[:-keep_last]:
        if step not in keep:
            path_of(folder, step).unlink(missing_ok=True)


def check_fits(params: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a checkpoint whose parameters are not those of the configured network, naming the first that differs."""
    for name in [*expected, *params]:
        have = tuple(params[name].shape) if name in params else None
        want = tuple(expected[name].shape) if name in expected else None
        if have != want:
            raise CheckpointError(
                f"{path} is of another network: {name} has shape {have or 'none'} in the file, "
                f"{want or 'none'} in the configuration",
                "use the configuration that made it, or another run.dir",
            )


def _digest(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """SHA-256 over step and state, then names, types, shapes and bytes in order of name."""
    sha = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return sha.hexdigest()
