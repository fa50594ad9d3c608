"""One checkpoint for all ranks: read and verified by the first rank of each machine, whose word the others take."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from cml_dist.errors import CheckpointError, WorldError
from cml_dist.parallel.world import World
from cml_dist.run.checkpoint import Checkpoint, load
from cml_dist.run.folder import SEEN_WITHIN_S

T = TypeVar("T")


def same_checkpoint(
    world: World, look: Callable[[], tuple[Checkpoint | None, T]], note: Callable[[str], None]
) -> tuple[Checkpoint | None, T]:
    """What ``look`` finds, the same on all ranks, also soon after rank 0 has saved one.

    Args:
        look: finds a checkpoint and verifies it; what it says besides is sent to all, as rank 0's machine says it.
        note: is told where the machines wait for a network file system.

    Raises:
        CheckpointError: ``look`` did, on every machine, or still on one after that time.
        WorldError: the machines see different ones, also after the time for which NFS may show an old view.

    Cost: the file is read through once a machine. Collective: all ranks.
    """
    reads = world.is_main or world.local_rank == 0
    for wait_s in (SEEN_WITHIN_S, 0.0):
        mine, error = world.together(partial(_looked, look) if reads else lambda: (None, None))
        told = world.gather(error if mine is None else (_identity(mine[0]), mine[1]))
        views = {rank: view for rank, view in enumerate(told) if view is not None}
        errors = [view for view in views.values() if isinstance(view, CheckpointError)]
        if errors and (len(errors) == len(views) or not wait_s):
            errors[0].everywhere = True  # every rank raises it now
            raise errors[0]
        if not errors:
            identity, said = views[0]
            if all(other == identity for other, _ in views.values()):
                return world.together(partial(_opened, mine, identity)), said
        if wait_s:
            note("The machines see different checkpoints: the file system gets a minute to show all")
        time.sleep(wait_s)
    seen = ", ".join(f"rank {rank}: {'none' if view is None else view[0]}" for rank, (view, _) in views.items())
    raise WorldError(
        f"the machines see different checkpoints ({seen})", "put run.dir on a file system that all machines share"
    )


def _looked(
    look: Callable[[], tuple[Checkpoint | None, T]],
) -> tuple[tuple[Checkpoint | None, T] | None, CheckpointError | None]:
    """What is found, or why nothing is: an old view of the folder may hide a checkpoint that is there."""
    try:
        return look(), None
    except CheckpointError as error:
        return None, error


def _identity(found: Checkpoint | None) -> tuple[str, str] | None:
    """(path, SHA-256) of a checkpoint that was verified."""
    return None if found is None else (str(found.path), found.sha256)


def _opened(mine: tuple[Checkpoint | None, Any] | None, identity: tuple[str, str] | None) -> Checkpoint | None:
    """The one that this rank has verified, or that the first rank of its machine has."""
    if mine is not None:
        return mine[0]
    return None if identity is None else load(*identity)
