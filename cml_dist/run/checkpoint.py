"""Checkpoints: one file each, whole or not there, independent of strategy and world size.

``checkpoints/step-00000500.safetensors`` holds ``param/<canonical name>`` and ``moment/<key>/<canonical name>``; its
metadata the step, the run's state, and a SHA-256 of all tensors, which loading verifies. Files are written and read
tensor by tensor: whatever the size of the model, one tensor is in memory here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from torch import Tensor, nn

from cml_dist.atomic import LEFTOVERS, atomic_file
from cml_dist.config.versioned import BEFORE
from cml_dist.distributed.heartbeat import this_heartbeat
from cml_dist.distributed.world import World
from cml_dist.errors import CheckpointError
from cml_dist.run.folder import path_of, steps_in, wait_until_seen
from cml_dist.run.safetensors_stream import StreamReader, tensor_bytes, write_stream
from cml_dist.types import RULE, Layout, Params

TRAIL = "trail"
"""Folder, beside the checkpoints, of those that hold parameters alone (checkpoint.keep_every)."""

FORMAT = 2
"""Format 1, still read, differs in its SHA-256 alone: there it ran over the tensors' bytes, and not their digests."""


class _Line(BaseModel):
    step: int = Field(ge=0, lt=10**8)
    mean: float | None


class _State(BaseModel):
    """What is read of a run's state; it may hold more."""

    best: _Line | None = None
    top: list[_Line] = []
    validated: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    data: str = ""
    constants: str = ""


class _Meta(BaseModel):
    """What is read of a checkpoint's metadata: whoever made the file may have written anything."""

    format: int
    step: int = Field(ge=0, lt=10**8)
    state: _State


class DamagedCheckpoint(CheckpointError):
    """Missing, truncated or altered: an older one may do."""


class Checkpoint:
    """A checkpoint that was verified; its tensors are read by name, when they are asked for.

    It keeps its file open: what is read is what was verified, even if the file is pruned or replaced meanwhile.

    Attributes:
        step: meta-steps done.
        state: small JSON values: the best validation so far, counters.
        layout: type and shape of every tensor.
        sha256: of all of it.
    """

    def __init__(self, path: Path, file: StreamReader, meta: Mapping[str, Any], sha256: str) -> None:
        self.path, self._file, self.layout, self.sha256 = path, file, file.layout, sha256
        self.step: int = meta["step"]
        self.state: dict[str, Any] = meta["state"]

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


def save(
    world: World,
    folder: Path,
    step: int,
    state: dict[str, Any],
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    before: Callable[[], None] = lambda: None,
    trail: bool = False,
) -> Path:
    """Write a checkpoint by rank 0, see :func:`atomic_file`.

    Args:
        layout: what ``tensors`` will bring (``strategy.saved_layout()``).
        tensors: (name, whole tensor on the CPU), made one at a time (``strategy.saved_tensors()``); on other ranks
            than 0 they are asked for and not looked at.
        before: called right before the rename; a CheckpointError that it raises calls it off.
        trail: one of the trail: of the parameters alone, which come first.

    Raises:
        CheckpointError: the file system refused (full, read-only), or ``before`` did; older checkpoints are untouched.

    Collective: all ranks, and all raise it if rank 0 cannot write. An error in ``tensors`` itself is raised where it
    happens and at once, since the other ranks then wait in a collective of theirs.
    """
    if trail:
        layout = {name: kind for name, kind in layout.items() if name.startswith("param/")}
        tensors = islice(tensors, len(layout))
    tensors, target = iter(tensors), path_of(folder / TRAIL if trail else folder, step)
    meta, digests = {"format": FORMAT, "step": step, "state": state}, {}
    fault: CheckpointError | None = None

    def digested() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            digests[name] = _sha256(tensor)
            yield name, tensor
            del tensor  # or it would live on while the next one is made
            this_heartbeat().touch()

    def metadata() -> dict[str, str]:
        sha256 = _digest(meta, layout, digests.__getitem__) if digests else "0" * 64
        return {"cml_dist": json.dumps({**meta, "sha256": sha256})}

    if world.is_main:
        world.heartbeat.beat(f"saving step {step}")
        try:
            with atomic_file(target, before) as temporary:
                write_stream(temporary, layout, digested(), metadata)
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


def load(path: str | Path, verified: str | None = None) -> Checkpoint:
    """Open and verify one checkpoint, tensor by tensor.

    Args:
        verified: SHA-256 of the one that is meant, where another process has just read it: its tensors are not read
            again.

    Raises:
        DamagedCheckpoint: missing, truncated or altered.
        CheckpointError: of another format, or it cannot be read now.
    """
    path = Path(path)
    with _damage_named(path):
        file = StreamReader(path)
        meta = json.loads(file.metadata["cml_dist"])
        _Meta.model_validate(meta, strict=True)
        version, expected = meta["format"], meta.pop("sha256", None)
        if version not in (1, FORMAT):
            raise CheckpointError(
                f"checkpoint {path} has format {version}, this version reads {FORMAT}", "use the version that wrote it"
            )

        def content(name: str) -> bytes | memoryview:
            this_heartbeat().touch()
            return (tensor_bytes if version == 1 else _sha256)(file.read(name))

        if (_digest(meta, file.layout, content) if verified is None else verified) != expected:
            raise ValueError("its contents do not match their SHA-256")
        return Checkpoint(path, file, meta, expected)


def load_newest(folder: Path, warn: Callable[[str], None] = lambda fault: None) -> Checkpoint | None:
    """The newest checkpoint that is whole, None where there is none; ``warn`` is told of newer ones that are damaged.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    fault = None
    for step in reversed(steps_in(folder)):
        try:
            return load(path_of(folder, step))
        except DamagedCheckpoint as error:
            fault = error
            warn(f"{fault.what}: the one before it is used")
    if fault is None:
        return None
    raise CheckpointError(f"no checkpoint in {folder} is whole: {fault.what}", "restore one, or start in a new run.dir")


def newest_state(folder: Path) -> dict[str, Any]:
    """The state in the newest checkpoint with a whole header, empty where there is none: no weights are read.

    It is not verified: whoever loads that checkpoint does so.
    """
    for step in reversed(steps_in(folder)):
        with suppress(DamagedCheckpoint), _damage_named(path_of(folder, step)):
            return dict(json.loads(StreamReader(path_of(folder, step)).metadata["cml_dist"])["state"])
    return {}


def find(folder: Path, which: str, warn: Callable[[str], None]) -> tuple[Checkpoint, str]:
    """The checkpoint of the best validation (``best``), the newest (``last``), or of a step, and how it was chosen.

    A step may also be one of the trail, whose checkpoints hold no moments. Where ``best`` has none (never validated, or
    damaged) it is the newest, which then is called ``last``. ``warn`` is told of what is passed over.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    steps = steps_in(folder)
    for place in (folder / TRAIL, folder) if which.isdigit() else ():
        if int(which) in steps_in(place):
            return load(path_of(place, int(which))), which
    if not steps:
        raise CheckpointError(f"{folder} holds no checkpoint yet", "train it first: cml-dist train")
    if which not in ("best", "last"):
        kept = sorted({*steps, *steps_in(folder / TRAIL)})
        raise CheckpointError(f"{folder} keeps no checkpoint {which!r}", f"use best, last, or one of {kept}")
    found, how = load_newest(folder, warn), "last"
    best = found.state.get("best")
    if which == "best" and best is not None:
        try:
            found, how = found if best["step"] == found.step else load(path_of(folder, best["step"])), "best"
        except DamagedCheckpoint as error:
            warn(f"{error.what}: step {found.step} is used")
    return found, how


def choose(
    folder: Path, which: str, net: nn.Module, warn: Callable[[str], None], data: str | None = None
) -> tuple[Checkpoint, str]:
    """:func:`find`, of this very run: else CheckpointError, as :func:`check_same_run` says."""
    found, how = find(folder, which, warn)
    check_same_run(found, net, data)
    return found, how


def on_all_ranks(
    world: World, look: Callable[[Callable[[str], None]], tuple[Checkpoint | None, str]], warn: Callable[[str], None]
) -> tuple[Checkpoint | None, str]:
    """What ``look`` finds on rank 0, which alone reads the file through, opened by all ranks; and what else it says.

    Args:
        look: told where to warn.
        warn: hears those warnings on all ranks, so that each one's log has them.

    Raises:
        CheckpointError: ``look`` did. NetworkError: another machine does not see that file.

    Collective: all ranks.
    """
    faults: list[str] = []
    mine, said = world.run_on_all_ranks((lambda: look(faults.append)) if world.is_main else lambda: (None, ""))
    found, said, faults = world.gather((mine and (str(mine.path), mine.sha256), said, faults))[0]
    for fault in faults:
        warn(fault)

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


def prune(folder: Path, keep_last: int, keep: Collection[int]) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and those of the steps ``keep``.

    Also what killed writers left half-written: only the one trainer of a run folder writes there, and it is here now.
    """
    for leftover in (*folder.glob(LEFTOVERS), *(folder / TRAIL).glob(LEFTOVERS)):
        leftover.unlink(missing_ok=True)
    for step in steps_in(folder)[:-keep_last]:
        if step not in keep:
            path_of(folder, step).unlink(missing_ok=True)


def check_versions(checkpoint: Checkpoint, versions: Mapping[str, Any]) -> None:
    """CheckpointError where training would go on by other versions of rules (config/versioned.py) than it began by."""
    began = {**BEFORE, **checkpoint.state.get("versions", {})}
    if any(began[key] != now for key, now in versions.items()):
        raise CheckpointError(
            f"{checkpoint.path} was trained by {began}, but config.yaml says {dict(versions)}",
            "restore the config.yaml of its run, or choose another run.dir",
        )


def check_same_run(checkpoint: Checkpoint, net: nn.Module, data: str | None = None) -> None:
    """Raise CheckpointError for a checkpoint of another network, other frozen weights, or other data.

    Args:
        data: checksum of the data, which may lie elsewhere than before; None: they need not be the run's.
    """
    path, state = checkpoint.path, checkpoint.state
    if data is not None and (then := state.get("data", "none")) != data:
        raise CheckpointError(
            f"the data is not that of the run of {path} (checksum {then[:12]}, now {data[:12]})",
            "point domain.root at the same packed set, or choose another run.dir",
        )
    expected = {f"param/{name}": tuple(p.shape) for name, p in net.named_parameters()}
    stored = {name: shape for name, (_, shape) in checkpoint.layout.items() if name.startswith("param/")}
    moments: dict[str, set[str]] = {}
    for name, (dtype, shape) in checkpoint.layout.items():
        kind, _, rest = name.partition("/")
        key, _, owner = rest.partition("/")
        if kind != "param":
            moments.setdefault(owner, set()).add(key)
            owned = kind == "moment" and shape == (() if key == "step" else stored.get(f"param/{owner}"))
            if not owned or not dtype.is_floating_point:
                raise CheckpointError(f"{path} is damaged: it holds {name} of shape {shape}", "use another checkpoint")
    for owner, keys in moments.items():
        if keys != set().union(*moments.values()):
            raise CheckpointError(f"{path} is damaged: moments of {owner} are missing", "use another checkpoint")
    for name in {**expected, **stored}:
        have, want = stored.get(name, "none"), expected.get(name, "none")
        if have != want:
            whose, remedy = "is of another network", "use the configuration that made it, or another run.dir"
            if name.startswith(f"param/{RULE}."):
                whose = "holds what another method learned"
                remedy = "set method.name, method.inner_steps and method.adapts as they were when it was trained"
            name = name.removeprefix("param/")
            raise CheckpointError(
                f"{path} {whose}: {name} has shape {have} in the file, {want} in the configuration", remedy
            )
    # Frozen weights and statistics are in no checkpoint, and earlier versions did not say which they were.
    constants = fingerprint(net.named_buffers())
    if state.get("constants", constants) != constants:
        raise CheckpointError(
            f"the frozen weights or statistics are not those with which {path} was trained",
            "give model.pretrained the weight file that the run was started with, or choose another run.dir",
        )


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name and bytes of each tensor; empty for none."""
    named = sorted(tensors)
    return hashlib.sha256(b"".join(name.encode() + _sha256(t) for name, t in named)).hexdigest() if named else ""


def _digest(meta: Mapping[str, Any], layout: Layout, content: Callable[[str], bytes | memoryview]) -> str:
    """SHA-256 over format, step and state, then name, type, shape and ``content`` of each tensor in order of name."""
    sha = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, (dtype, shape) in sorted(layout.items()):
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
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"checkpoint {path} is missing", "use another one") from error
    except OSError as error:  # a file server that is away says nothing of the contents: no older one is used for it
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {error.strerror}",
            "mend that, then run the same command; without the file, the one before it is used",
        ) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged ({str(error)[:500]})", "delete it; the one before it is used"
        ) from error
