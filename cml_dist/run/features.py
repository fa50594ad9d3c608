"""Features of a frozen body: where nothing changes them they are computed once, and episodes draw them as inputs."""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Collection
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from cml_dist.config.methods import lora_rank
from cml_dist.config.schema import AugmentConfig, ImageSettings, RunConfig
from cml_dist.data.base import Domain, Progress
from cml_dist.data.free_memory import available_bytes
from cml_dist.distributed.world import World
from cml_dist.errors import DataError
from cml_dist.memory.choose import autocast_type
from cml_dist.meta.rule import part_of
from cml_dist.nets.guard import couples_examples
from cml_dist.nets.network import CmlNet
from cml_dist.registry import TIMM, backbone_entry
from cml_dist.run.checkpoint import newest_state
from cml_dist.run.folder import RunFolder
from cml_dist.telemetry.console import Console, preparing
from cml_dist.types import BODY
from cml_dist.user_code import is_code

if TYPE_CHECKING:
    from cml_dist.data.images import ImageDomain
    from cml_dist.nets.timm_backbone import TimmBackbone

AT_ONCE = 64
"""Images that pass through the body at once, always the same ones together: their features are the same bits in each
start of a run, whatever its processes."""


def are_constant(config: RunConfig, net: CmlNet) -> bool:
    """Whether an image has the same features in all of a run, and ``domain.features`` wants them kept."""
    domain, own = config.domain, is_code(config.model.backbone) or is_code(config.method.name)
    return (
        isinstance(domain, ImageSettings)
        and domain.features != "compute"
        and backbone_entry(config.model.backbone) is TIMM
        and not own  # which may do with frozen weights what it likes
        and not lora_rank(config.method.adapts)
        and not any(part_of(name) == BODY for name, _ in net.named_parameters())
        and not couples_examples(net.body)
    )


def images_drawn(config: RunConfig, training: bool) -> Counter[str]:
    """By split, how many images the episodes of a run draw, or of a test alone."""
    domain, episodes = config.domain, Counter()
    if training:
        episodes["train"] = config.train.steps * config.train.episodes_per_step
        episodes["val"] = config.num_validations * config.eval.val_episodes
    if not training or config.eval.final:
        episodes[config.eval.split] += config.eval.episodes
    each = domain.ways * (domain.shots + domain.queries) + domain.unlabelled * (domain.ways + domain.distractors)
    drawn = Counter({split: n * each for split, n in episodes.items()})
    if domain.batch:
        drawn["train"] = episodes["train"] * domain.batch
    return drawn


def keep_features(
    config: RunConfig,
    net: CmlNet,
    domain: Domain,
    world: World,
    console: Console,
    splits: Collection[str],
    *,
    training: bool,
) -> tuple[str, ...]:
    """Have episodes of these splits give the body's features, where these never change; returns the splits that do.

    A split of which fewer images will be drawn than it has goes without; a run that goes on keeps to the splits of its
    first start. The ranks share the work, and each keeps all.

    Args:
        net: on the CPU, with its values.
        training: whether a run's episodes are drawn, and not those of a test alone.

    Collective: all ranks, and all fail together.
    """
    if not are_constant(config, net):
        return ()
    then = None
    if training:  # as rank 0 sees it: another machine may not see the newest checkpoint yet
        then = world.run_on_all_ranks(lambda: newest_state(RunFolder(config.run.dir).checkpoints).get("kept"))
        (then, *_) = world.gather(then if isinstance(then, list) else None)
    drawn = images_drawn(config, training)
    chosen = [split for split in splits if split != "train" or config.domain.augment == AugmentConfig()]
    if then is None:
        chosen = [split for split in chosen if drawn[split] >= domain.shards.num_images(split)]
    else:
        chosen = [split for split in chosen if split in then]
    body = copy.deepcopy(net.body).to(world.device)
    with preparing(console) as progress:
        kept = [_keep(config, body, net.colearner is not None, domain, split, world, progress) for split in chosen]
    if kept:
        words = ", ".join(f"{len(table):,} {split}" for split, table in zip(chosen, kept, strict=True))
        on_disk = any(isinstance(table, np.memmap) for table in kept)
        place = f"a file in {config.run.dir}" if on_disk else "memory"
        size = sum(table.nbytes for table in kept) / 2**20
        console.note(
            f"The body is frozen: the features of {words} images are computed once and kept in {place}, "
            f"{max(size, 0.1):,.1f} MiB a process (domain.features)"
        )
    return tuple(chosen)


def _keep(
    config: RunConfig,
    body: TimmBackbone,
    with_tap: bool,
    domain: ImageDomain,
    split: str,
    world: World,
    progress: Progress,
) -> np.ndarray:
    """Compute and keep one split's features ``[images, K]``. Collective: all ranks."""
    count, dtype = domain.shards.num_images(split), getattr(torch, config.run.dtype)
    width = body.pooled_dim + with_tap * int(np.prod(body.tap_shape))
    table = world.run_on_all_ranks(lambda: _room(config, (count, width), world.local_size))
    kind = autocast_type(config)

    def compute(numbers: range, first: int, of: int) -> torch.Tensor:
        """This rank's rows of ``of`` ones, and zeros in the place of the others'."""
        rows = torch.zeros(of, width, dtype=dtype, device=world.device)
        if numbers:
            pixels = torch.from_numpy(domain.images(split, numbers)).to(world.device)
            with torch.no_grad(), torch.autocast(world.device.type, kind) if kind else nullcontext():
                features = body.kept(body(domain.normalise(pixels, dtype)), with_tap)
            rows[numbers.start - first : numbers.stop - first] = features
        return rows

    for first in range(0, count, AT_ONCE * world.size):
        stop, start = min(first + AT_ONCE * world.size, count), first + AT_ONCE * world.rank
        mine = range(start, min(start + AT_ONCE, count))
        world.heartbeat.beat(f"features of {split} images ({first} of {count})")
        rows = world.run_on_all_ranks(lambda mine=mine, first=first, of=stop - first: compute(mine, first, of))
        table[first:stop] = world.sum(rows).numpy()
        if world.local_rank == 0:
            progress(stop, count, f"features of {split} images")
    domain.keep(split, table)
    return table


def _room(config: RunConfig, shape: tuple[int, int], processes: int) -> np.ndarray:
    """An array in memory where ``domain.memory_gib`` and free memory allow it, else in a file without a name, which
    goes with the process.
    """
    dtype = np.dtype(config.run.dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    if size <= min(config.domain.memory_gib * 2**30, available_bytes() // 2 // processes):
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=config.run.dir) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, and no SIGBUS later
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        what = f"features of {shape[0]:,} images ({size / 2**30:.2f} GiB) cannot be kept in {config.run.dir}"
        raise DataError(f"{what}: {error.strerror}", "free disk or memory, or set domain.features=compute") from error
