"""A whole split as one uint8 array, decoded by threads (Pillow works outside the interpreter lock)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cml_dist.domains.shard_format import Progress
from cml_dist.domains.shard_reader import ShardSet

_CHUNK_IMAGES = 256
_MAX_THREADS = 8


def decode_split(shards: ShardSet, split: str, progress: Progress | None = None) -> np.ndarray:
    """Pixels uint8 ``[N, C, H, W]`` of a split, in the order of the index.

    Raises:
        DataError: naming the first image that cannot be decoded, and its shard.
    """
    first, count = shards.first_image(split), shards.num_images(split)
    pixels = np.empty((count, shards.channels, *shards.image_size), dtype=np.uint8)

    def decode_chunk(start: int) -> int:
        stop = min(start + _CHUNK_IMAGES, count)
        for number in range(start, stop):
            pixels[number] = shards.decode(first + number)
        return stop

    pool = ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))))
    try:
        for done in pool.map(decode_chunk, range(0, count, _CHUNK_IMAGES)):
            if progress is not None:
                progress(done, count, f"decoding {split} images")
    finally:
        pool.shutdown(cancel_futures=True)
    return pixels
