"""Episodes in time: each rank's share of each meta-step, made ahead by workers where that was asked for."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from cml_dist.config.plan import share
from cml_dist.data.base import Domain
from cml_dist.distributed.exit import signal_when_parent_ends
from cml_dist.errors import CmlError, DataError
from cml_dist.types import Episode


def rank_share(step: int, batch: int, rank: int, world: int) -> range:
    """Training episodes that ``rank`` runs in meta-step ``step`` (0-based): a slice of [step*B, (step+1)*B)."""
    slice_ = share(batch, rank, world)
    return range(step * batch + slice_.start, step * batch + slice_.stop)


def episode_stream(
    domain: Domain,
    split: str,
    indices: Iterable[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    workers: int | None = None,
) -> Iterator[Episode]:
    """Prepared episodes of a split, in the order of ``indices``, as they are asked for.

    Args:
        workers: processes that make them ahead; 0 makes them here; None leaves it to the domain. Never changes an
            episode.
    """
    if workers is None:
        workers = domain.suggested_workers(split)
    episodes: Iterable[Episode | CmlError] = (domain.episode(split, index) for index in indices)
    if workers:
        episodes = DataLoader(
            _ByIndex(domain, split),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            worker_init_fn=_ignore_signals,
            # Workers never touch the global generators, and must not take from the trainer's.
            generator=torch.Generator(),
        )
    try:
        for episode in episodes:
            if isinstance(episode, CmlError):
                raise episode
            yield domain.prepare(episode, device, dtype)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        why = "see what it said" if "exited" in str(error) else "if memory ran out, lower domain.workers"
        raise DataError(f"a process that makes episodes ended: {error}", why) from error


class _ByIndex(Dataset):
    def __init__(self, domain: Domain, split: str) -> None:
        self.domain, self.split = domain, split

    def __getitem__(self, index: int) -> Episode | CmlError:
        try:
            return self.domain.episode(self.split, index)
        except CmlError as error:  # as a value: raised, it would be one line in a worker's long traceback
            return error


def _ignore_signals(worker: int) -> None:
    """A worker ends when the trainer does.

    Ctrl-C and a scheduler's SIGTERM reach every process: torch's own handler would end a worker at SIGTERM, and thereby
    the step that is to be saved. Other stop signals only set a flag in the worker's copy of the trainer's handler.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal_when_parent_ends(signal.SIGKILL)  # also where the trainer is killed
    torch.set_num_threads(1)
