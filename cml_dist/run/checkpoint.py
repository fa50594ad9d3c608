"""Checkpoints: one file each, whole or not there, independent of strategy and world size.

``checkpoints/step-00000500.safetensors`` holds ``param/<canonical name>`` and ``moment/<key>/<canonical name>``; its
metadata the step, the run's state, and a SHA-256 of all tensors, which loading verifies. Files are written and read
tensor by tensor: whatever the size of the model, one tensor is in memory here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from cml_dist.atomic import LEFTOVERS, atomic_file
from cml_dist.distributed.heartbeat import this_heartbeat
from cml_dist.distributed.world import World
from cml_dist.errors import CheckpointError
from cml_dist.run.folder import wait_until_seen
from cml_dist.run.safetensors_stream import StreamReader, StreamWriter, tensor_bytes
from cml_dist.types import RULE, Layout, Params

FORMAT = 2
"""Format 1, still read, differs in its SHA-256 alone: there it ran over the tensors' bytes, and not their digests."""

_NAME = re.compile(r"step-(\d{8})\.safetensors")
_NOT_NOW = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.EINTR)
"""What says nothing of a file's contents: an older one must not be used for it."""

T = TypeVar("T")


class DamagedCheckpoint(CheckpointError):
    """Missing, truncated or altered: an older one may do."""


class Checkpoint:
    """A checkpoint that was verified; its tensors are read by name, when they are asked for.

    It keeps its file open: what is read is what was verified, even if the file is pruned or replaced meanwhile.

    Attributes:
        path: the file.
        step: meta-steps done.
        state: small JSON values: the best validation so far, counters.
        layout: type and shape of every tensor.
        sha256: of all of it.
    """

    def __init__(self, path: Path, file: StreamReader, meta: Mapping[str, Any]) -> None:
        self.path, self._file = path, file
        self.step: int = meta["step"]
        self.state: dict[str, Any] = meta["state"]
        self.layout: Layout = file.layout
        self.sha256: str = meta["sha256"]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. Raises DamagedCheckpoint where the disk no longer gives it."""
        this_heartbeat().touch()  # reading a large model from a slow disk is no hang
        with _damage_named(self.path):
            return self._file.read(name)

    def params(self, names: Collection[str] | None = None) -> Params:
        """Parameters by canonical name, on the CPU: those in ``names``, or all; no moments are read."""
        if names is None:
            names = [n.removeprefix("param/") for n in self.layout if n.startswith("param/")]
        return {name: self.read(f"param/{name}") for name in names}


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m.group(1)) for m in map(_NAME.fullmatch, os.listdir(folder)) if m)


def save(
    world: World,
    folder: Path,
    step: int,
    state: dict[str, Any],
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    before: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint, see :func:`atomic_file`.

    Args:
        world: its rank 0 writes.
        layout: what ``tensors`` will bring (``strategy.saved_layout()``).
        tensors: (name, whole tensor on the CPU), made one at a time (``strategy.saved_tensors()``); on other ranks
            than 0 they are asked for and not looked at.
        before: called by rank 0 right before the rename; a CheckpointError that it raises calls it off.

    Raises:
        CheckpointError: the file system refused (full, read-only), or ``before`` did; older checkpoints are untouched.

    Cost: one tensor. Collective: all ranks, and all raise it if rank 0 cannot write. An error in ``tensors`` itself is
    raised where it happens and at once, since the other ranks then wait in a collective of theirs.
    """
    tensors, target = iter(tensors), path_of(folder, step)
    fault: CheckpointError | None = None
    if world.is_main:
        world.heartbeat.beat(f"saving step {step}")
        try:
            _write(target, {"format": FORMAT, "step": step, "state": state}, layout, tensors, before)
        except CheckpointError as error:
            fault = error
        except OSError as error:
            last = steps_in(folder)
            kept = f"the checkpoint of step {last[-1]} stays good" if last else "there is no earlier checkpoint"
            fault = CheckpointError(
                f"cannot save {target}: {error.strerror or error} ({kept})",
                "free space or mend the folder's permissions, then run the same command",
            )
    else:
        world.heartbeat.wait(f"saving step {step}")
    # On the other ranks, and on rank 0 after a fault: gathering a tensor is a collective, whether it is written or not.
    deque(tensors, maxlen=0)

    def report() -> None:
        if fault is not None:
            raise fault

    world.run_on_all_ranks(report)
    return target


def _write(
    target: Path,
    meta: dict[str, Any],
    layout: Layout,
    tensors: Iterator[tuple[str, Tensor]],
    before: Callable[[], None],
) -> None:
    """Rank 0's part of :func:`save`. Leaves ``tensors`` where it stands if the file system refuses."""
    digests: dict[str, bytes] = {}
    with atomic_file(target, before) as temporary, StreamWriter(temporary, layout, _metadata(meta, "0" * 64)) as writer:
        for name, tensor in tensors:
            digests[name] = _sha256(tensor)
            writer.put(name, tensor)
            del tensor  # or it would live on while the next one is made
            this_heartbeat().touch()
        writer.finish(_metadata(meta, _digest(meta, layout, digests.__getitem__)))


def load(path: str | Path, verified: str | None = None) -> Checkpoint:
    """Open and verify one checkpoint, tensor by tensor.

    Args:
        verified: SHA-256 of the one that is meant, where another process has just read it: its tensors are not read
            again.

    Raises:
        DamagedCheckpoint: missing, truncated or altered.
        CheckpointError: of another format, or under the name of another step.
    """
    path = Path(path)
    with _damage_named(path):
        file = StreamReader(path)
        meta = json.loads(file.metadata["cml_dist"])
        version, expected = meta["format"], meta.pop("sha256", None)
    if version not in (1, FORMAT):
        raise CheckpointError(
            f"checkpoint {path} has format {version}, this version reads {FORMAT}", "use the version that wrote it"
        )

    def content(name: str) -> bytes | memoryview:
        this_heartbeat().touch()
        return (tensor_bytes if version == 1 else _sha256)(file.read(name))

    with _damage_named(path):
        if (_digest(meta, file.layout, content) if verified is None else verified) != expected:
            raise ValueError("its contents do not match their SHA-256")
    if path.name != path_of(path.parent, meta["step"]).name:
        raise CheckpointError(
            f"{path} holds step {meta['step']}", f"rename it to {path_of(path.parent, meta['step']).name}"
        )
    return Checkpoint(path, file, {**meta, "sha256": expected})


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


def on_all_ranks(world: World, look: Callable[[], tuple[Checkpoint | None, T]]) -> tuple[Checkpoint | None, T]:
    """What ``look`` finds and verifies on rank 0, opened by all ranks, and what else it returns.

    Raises:
        CheckpointError: ``look`` did. NetworkError: another machine does not see that file.

    Cost: rank 0 reads the file through. Collective: all ranks.
    """
    mine, said = world.run_on_all_ranks(look if world.is_main else lambda: (None, None))
    found, said = world.gather((mine and (str(mine.path), mine.sha256), said))[0]

    def open_it() -> Checkpoint | None:
        if world.is_main or found is None:
            return mine
        path, sha256 = found
        wait_until_seen(path, Path(path).exists)
        return load(path, sha256)

    return world.run_on_all_ranks(open_it), said


def set_aside(folder: Path, after: int) -> None:
    """Rename the checkpoints after a step, which were found damaged: none may count as one of the newest."""
    for step in steps_in(folder):
        if step > after:
            path = path_of(folder, step)
            os.replace(path, path.with_name(f"{path.name}.damaged"))


def prune(folder: Path, keep_last: int, keep: frozenset[int]) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and those of the steps in ``keep``.

    Also what killed writers left half-written: only the one trainer of a run folder writes there, and it is here now.
    """
    for leftover in folder.glob(LEFTOVERS):
        leftover.unlink(missing_ok=True)
    for step in steps_in(folder)[:-keep_last]:
        if step not in keep:
            path_of(folder, step).unlink(missing_ok=True)


def check_same_run(checkpoint: Checkpoint, net: nn.Module, data: str | None = None) -> None:
    """Refuse a checkpoint of another network, other frozen weights, or other data.

    Args:
        data: checksum of the data, which may lie elsewhere than before; None: they need not be the run's.

    Raises:
        CheckpointError: naming the first difference.
    """
    expected = {f"param/{name}": tuple(p.shape) for name, p in net.named_parameters()}
    stored = {name: shape for name, (_, shape) in checkpoint.layout.items() if name.startswith("param/")}
    for name in {**expected, **stored}:
        have, want = stored.get(name, "none"), expected.get(name, "none")
        if have != want:
            whose, remedy = "is of another network", "use the configuration that made it, or another run.dir"
            if name.startswith(f"param/{RULE}."):
                whose = "holds what another method learned"
                remedy = "set method.name, method.inner_steps and method.adapts as they were when it was trained"
            raise CheckpointError(
                f"{checkpoint.path} {whose}: {name.removeprefix('param/')} has shape {have} in the file, {want} in the "
                "configuration",
                remedy,
            )
    if data is not None and checkpoint.state["data"] != data:
        raise CheckpointError(
            f"the data is not that of the run of {checkpoint.path} (checksum {checkpoint.state['data'][:12]}, now "
            f"{data[:12]})",
            "point domain.root at the same packed set, or choose another run.dir",
        )
    # Frozen weights and statistics are in no checkpoint, and earlier versions did not say which they were.
    constants = fingerprint(net.named_buffers())
    if checkpoint.state.get("constants", constants) != constants:
        raise CheckpointError(
            f"the frozen weights or statistics are not those with which {checkpoint.path} was trained",
            "give model.pretrained the weight file that the run was started with, or choose another run.dir",
        )


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name and bytes of each tensor; empty for none."""
    named = sorted(tensors)
    sha = hashlib.sha256()
    for name, tensor in named:
        sha.update(name.encode() + _sha256(tensor))
    return sha.hexdigest() if named else ""


def _metadata(meta: Mapping[str, Any], sha256: str) -> dict[str, str]:
    return {"cml_dist": json.dumps({**meta, "sha256": sha256})}


def _digest(meta: Mapping[str, Any], layout: Layout, content: Callable[[str], bytes | memoryview]) -> str:
    """SHA-256 over format, step and state, then name, type, shape and ``content`` of each tensor in order of name."""
    sha = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(layout):
        dtype, shape = layout[name]
        sha.update(f"{name}|{dtype}|{shape}|".encode())
        sha.update(content(name))
    return sha.hexdigest()


def _sha256(tensor: Tensor) -> bytes:
    """A digest of its own for each tensor: they come in the strategy's order, and are put together in that of names."""
    return hashlib.sha256(tensor_bytes(tensor)).digest()


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what a damaged file does to its reader into DamagedCheckpoint."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _NOT_NOW:
            raise CheckpointError(
                f"checkpoint {path} cannot be read: {error.strerror}", "mend that, then run the same command"
            ) from error
        fault = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise DamagedCheckpoint(f"checkpoint {path} is {fault}", "delete it; an older one is used") from error
