"""A GPU whose memory runs out: what was asked for, what was there, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cml_dist.errors import DeviceMemoryError

_ASKED = re.compile(r"Tried to allocate (\S+ \S+)\.")
_THERE = re.compile(r"total capacity of (\S+ \S+) of which (\S+ \S+) is free")


@contextmanager
def memory_explained(device: torch.device) -> Iterator[None]:
    """Turn the allocator's error, a paragraph about its own settings, into one line with this package's remedies.

    Raises:
        DeviceMemoryError: in the place of ``torch.OutOfMemoryError``, by the rank that it happened to.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked, there = _ASKED.search(str(error)), _THERE.search(str(error))
        what = f"the GPU's memory ran out ({device})"
        if asked and there:
            what += f": {asked[1]} were asked for, {there[2]} of {there[1]} were free"
        raise DeviceMemoryError(
            what,
            "see nvidia-smi for other processes on it; set memory.budget_gib below what is free, so that engine, "
            "micro-batch and copies are chosen to fit, or take a ZeRO strategy (cml-dist plan says what each needs)",
        ) from error
