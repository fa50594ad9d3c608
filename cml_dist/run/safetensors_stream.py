"""The safetensors format, one tensor at a time: a file larger than memory can be written and read.

A file is the length of the header (8 bytes), the header (JSON: type, shape and place of each tensor, and metadata), and
the bytes of the tensors. The header follows from names, types and shapes alone, so it can be laid out before the
first tensor exists. Files are those that the safetensors library would write, to the byte.

Reading is done here too, since the library maps the file: every page that was read then counts as this process's
resident memory (measured: 604 MB for a file of 600 MB), which a memory budget must not see.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cml_dist.atomic import atomic_file, refused
from cml_dist.run.folder import REST, WEIGHTS
from cml_dist.types import BODY, Layout

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""In the library's order: tensors lie in descending order of type, so that each is aligned to its elements."""

MOST_HEADER = 100_000_000
"""Bytes, as in the library."""


def write_stream(
    path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]], metadata: Callable[[], Mapping[str, str]]
) -> None:
    """Write a file anew from tensors that come one by one, in any order, each to the place laid out for it.

    Args:
        layout: type and shape of every tensor that will come.
        tensors: on the CPU.
        metadata: asked for before the first tensor and after the last one, and of the same length: what is known only
            then may hold a placeholder at first.

    Raises:
        OSError: the file system refused; ``tensors`` stays where it stands.
    """
    offsets, header = _offsets(layout), _header(layout, metadata())
    # Unbuffered: a full disk is an error of the write that met it, and never one of a later close.
    with open(path, "wb", buffering=0) as file:

        def write(offset: int, data: memoryview) -> None:
            file.seek(offset)
            while data:
                data = data[file.write(data) :]  # a single write ends at 2 GiB

        for name, tensor in tensors:
            have = (tensor.dtype, tuple(tensor.shape))
            assert have == layout[name], f"{name} is {have}, but was laid out as {layout[name]}"
            write(len(header) + offsets.pop(name)[0], tensor_bytes(tensor))
            del tensor  # or it would live on while the next one is made
        final = _header(layout, metadata())
        assert not offsets and len(final) == len(header), f"never came, or metadata of another length: {list(offsets)}"
        write(0, memoryview(final))  # the last: before it, this is no safetensors file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are there, from any device, as a whole file or not at all.

    Not by the library's save_file, which makes files that nobody but their owner may read, whatever the umask.

    Raises:
        CmlError: the file system refused.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    try:
        with atomic_file(path) as temporary:
            parts = ((name, tensor.cpu()) for name, tensor in tensors.items())
            write_stream(temporary, layout, parts, lambda: metadata or {})
    except OSError as error:
        raise refused(path, error) from error


class StreamReader:
    """Reads tensors of a safetensors file by name; the file stays open, so it may be renamed or deleted meanwhile.

    Attributes:
        layout: type and shape of every tensor, in order of name.
        metadata: the file's.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")
        weakref.finalize(self, self._file.close)
        length, size = int.from_bytes(self._file.read(8), "little"), os.fstat(self._file.fileno()).st_size
        self._data = 8 + length
        if size < self._data:
            raise ValueError("the file ends within its header")
        if length > MOST_HEADER:
            raise ValueError(f"its header has {length:,} bytes")
        try:
            entries = json.loads(self._file.read(length))
            self.metadata: dict[str, str] = entries.pop("__metadata__", {})
            self.layout: Layout = {n: (DTYPES[e["dtype"]], tuple(e["shape"])) for n, e in sorted(entries.items())}
            if any(type(side) is not int or not 0 <= side < 2**62 for _, s in self.layout.values() for side in s):
                raise ValueError("a shape is none")
            self._offsets = {n: tuple(e["data_offsets"]) for n, e in entries.items()}
            end = max((end for _, end in self._offsets.values()), default=0)
            if self._offsets != _offsets(self.layout) or end != size - self._data:
                raise ValueError("the file is shorter or longer than its header says")
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no safetensors header ({error})") from error

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, with memory of its own. Raises ValueError where the file has become shorter."""
        dtype, shape = self.layout[name]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(self._data + self._offsets[name][0])
        data = tensor_bytes(tensor)
        if self._file.readinto(data) != len(data):
            raise ValueError(f"the file ends within {name}")
        return tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor as the format has them: row-major, little-endian. No copy where it is contiguous."""
    assert sys.byteorder == "little", "safetensors are little-endian"
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _offsets(layout: Layout) -> dict[str, tuple[int, int]]:
    """(begin, end) of each tensor in bytes after the header, in the order of the file."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
    offsets, end = {}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-ranks[item[1][0]], item[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        offsets[name] = (begin, end)
    return offsets


def _header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON, padded so that the tensors begin at a multiple of 8."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, offsets in _offsets(layout).items():
        dtype, shape = layout[name]
        entries[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_exported(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export, or of another network that is no checkpoint, by canonical name.

    Raises:
        OSError: they cannot be read. ValueError: a file is no whole safetensors file.
    """
    tensors = _read_all(folder / WEIGHTS)
    if (folder / REST).is_file():  # the others then have timm's own names
        tensors = {f"{BODY}.model.{name}": value for name, value in tensors.items()} | _read_all(folder / REST)
    return tensors


def _read_all(path: Path) -> dict[str, Tensor]:
    file = StreamReader(path)
    return {name: file.read(name) for name in file.layout}
