"""The bytes that a computation holds at its peak, found by running it on tensors without storage.

No model of memory: the code itself runs, its autograd graphs keep what they keep, and each storage is counted from the
operator that makes it until nothing refers to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ELSEWHERE = torch.device("meta")
"""Stands, where a fake CPU is the computing device, for memory that is not its own (e.g. of offloaded copies)."""


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class LiveBytes(TorchDispatchMode):
    """Counts live storages of the tensors that operators return inside the context.

    Use it with tensors on the meta device or inside a ``FakeTensorMode`` (nothing is computed), or with real ones.

    Args:
        scratch: also count, while it runs, what a CPU kernel takes besides its outputs (:func:`scratch_bytes`).
        elsewhere: a device whose tensors do not count.

    Attributes:
        live, peak: bytes now, and at most; without those of :meth:`standing` tensors.
    """

    def __init__(self, scratch: bool = False, elsewhere: torch.device | None = None) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._scratch = scratch
        self._elsewhere = elsewhere
        self._known: dict[int, Any] = {}  # storage -> what keeps or watches it

    def standing(self, tensors: Iterable[Tensor]) -> None:
        """Leave out storages that were there before (parameters); they must outlive the context."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.device != self._elsewhere:
                self._watch(value.untyped_storage())
        held = self.live + (scratch_bytes(func, args, result) if self._scratch else 0)
        self.peak = max(self.peak, held)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def released(_: weakref.ref) -> None:
            self.live -= size
            del self._known[key]

        self.live += size
        self._known[key] = weakref.ref(storage, released)


def scratch_bytes(func: torch._ops.OpOverload, args: tuple, result: Any) -> int:
    """Bytes that the CPU kernel of an operator takes besides its inputs and outputs.

    oneDNN convolves in layouts of its own and keeps a reordered copy of each operand meanwhile; images of up to 4
    channels it reads as they are. All other operators of the networks here work in their outputs (measured, operator by
    operator, in benchmarks/2026-11-25-plan.md).
    """
    if func is torch.ops.aten.convolution.default:
        outputs, (inputs, weight) = result, args[:2]
    elif func is torch.ops.aten.convolution_backward.default:
        outputs, inputs, weight = args[:3]
    else:
        return 0
    return bytes_of(outputs) + bytes_of(weight) + (bytes_of(inputs) if inputs.shape[1] > 4 else 0)
