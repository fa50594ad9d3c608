"""The global norm of the meta-gradient: one meaning for every strategy."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def global_norm(tensors: Iterable[Tensor]) -> float:
    """L2 norm over all tensors, which share a device; not finite where an element is not.

    Each tensor's own norm counts by itself, and they are added in float64 one after the other: a tensor of zeros (phi's
    gradient at gamma 0) changes no bit, which it would in a sum over vectors of norms.
    """
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return math.hypot(*torch.stack(norms).tolist()) if norms else 0.0
