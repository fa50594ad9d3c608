"""Pickles of plain data, read without trusting them: no code of theirs runs, and nothing is made that they do not hold.

Neither by the unpickler in C, which takes memory by numbers in the file, nor by numpy's classes, which trust the state
that they are given: a made file ends the process by either. (torchvision's reader runs what the file says.)
"""

from __future__ import annotations

import math
import pickle
from typing import Any, BinaryIO

import numpy as np

_DTYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"b1"}


def load(stream: BinaryIO) -> Any:
    """Lists, dictionaries, bytes, texts, numbers and arrays of bytes or whole numbers; tuples become lists.

    Keys of dictionaries that were written as bytes (by Python 2) are texts.

    Raises:
        Exception: of many kinds, if it is damaged or holds anything else.
    """
    return _plain(_PlainData(stream, encoding="bytes").load())


def text(value: Any) -> str:
    """A text, or bytes as one."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    """What stand-ins stand for, in dictionaries and in lists of arrays."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return {text(key): _plain(item) for key, item in value.items()}
    return [getattr(item, "array", item) for item in value] if isinstance(value, list) else value


class _Dtype:
    """Stands for a numpy.dtype; of its state only the order of bytes is taken."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.order, self.name = "=", text(name)
        if self.name not in _DTYPES:
            raise pickle.UnpicklingError(f"it has an array of dtype {self.name}")

    def __setstate__(self, state: list[Any]) -> None:
        self.order = text(state[1])


class _Array:
    """Stands for a numpy.ndarray, which is made of the very bytes that the file holds."""

    def __setstate__(self, state: list[Any]) -> None:
        shape, dtype, by_columns, data = state[-4:]
        dtype = np.dtype(dtype.order + dtype.name)
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"it has an array {dtype} of shape {shape} in {len(data)} bytes")
        self.array = np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")


def _from_buffer(data: bytes, dtype: _Dtype, shape: list[int], order: str, axes: list[int] | None = None) -> _Array:
    """As which protocol 5 has arrays."""
    array = _Array()
    array.__setstate__([shape, dtype, order == "F", data])
    if axes:
        array.array = array.array.transpose(axes)
    return array


def _encode(characters: str, encoding: str) -> bytes:
    """As which protocol 2 has bytes."""
    return characters.encode("latin1" if encoding == "latin1" else "ascii")


_KNOWN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): lambda: {},
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "list"): lambda: [],
    ("__builtin__", "list"): lambda: [],
}
for _core in ("numpy.core", "numpy._core"):  # it moved in numpy 2
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _KNOWN[f"{_core}.multiarray", "scalar"] = lambda dtype, data: int(_from_buffer(data, dtype, [], "C").array)
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _PlainData(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _KNOWN[module, name]

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))  # no more than there is

    def load_last(self, count: int) -> None:
        self.stack[-count:] = [self.stack[-count:]]

    # No tuples: deeply nested ones end the process where they are hashed, as keys.
    dispatch = pickle._Unpickler.dispatch | {
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.EMPTY_TUPLE[0]: pickle._Unpickler.load_empty_list,
        pickle.TUPLE[0]: pickle._Unpickler.load_list,
        pickle.TUPLE1[0]: lambda self: self.load_last(1),
        pickle.TUPLE2[0]: lambda self: self.load_last(2),
        pickle.TUPLE3[0]: lambda self: self.load_last(3),
    }
