"""Episodes in time: each rank's share of each meta-step, made ahead by workers where that was asked for."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cml_dist.config.plan import share
from cml_dist.data.base import Domain
from cml_dist.distributed.exit import signal_when_parent_ends
from cml_dist.errors import CmlError, DataError
from cml_dist.types import Episode

AHEAD = 4
"""Episodes that are held ready while a GPU computes."""


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
    ahead: int | None = None,
) -> Iterator[Episode]:
    """Prepared episodes of a split, in the order of ``indices``, as they are asked for.

    Args:
        workers: processes that make them ahead; 0 makes them here; None leaves it to the domain. Never changes an
            episode.
        ahead: so many are taken over by a thread before they are asked for; None: none on a CPU, whose time the
            thread would take from the step.
    """
    if ahead is None:
        ahead = 0 if device.type == "cpu" else AHEAD
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
        for episode in _ahead(iter(episodes), ahead, device) if ahead else episodes:
            if isinstance(episode, CmlError):
                raise episode
            yield domain.prepare(episode, device, dtype)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        why = "see what it said" if "exited" in str(error) else "if memory ran out, lower domain.workers"
        raise DataError(f"a process that makes episodes ended: {error}", why) from error


def _ahead(episodes: Iterator[Episode | CmlError], count: int, device: torch.device) -> Iterator[Episode | CmlError]:
    """The same, ``count`` of them made by a thread while the caller is busy or waits for the device."""
    on_gpu = device.type == "cuda"

    def take() -> Episode | CmlError | None:
        episode = next(episodes, None)
        # From pinned memory alone a copy to a GPU does not wait for what the GPU has to do.
        return episode.map(_pinned) if on_gpu and isinstance(episode, Episode) else episode

    pool = ThreadPoolExecutor(1, "episodes", *((torch.cuda.set_device, (device,)) if on_gpu else ()))
    try:
        ready = deque(pool.submit(take) for _ in range(count))
        while (episode := ready.popleft().result()) is not None:
            ready.append(pool.submit(take))
            yield episode
    finally:
        pool.shutdown(cancel_futures=True)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" and tensor.layout == torch.strided else tensor


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
