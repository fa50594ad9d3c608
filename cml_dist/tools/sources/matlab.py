"""Variables of MATLAB 5 files, as image sets keep their labels: numbers, text, cells and structs.

By MathWorks' MAT-File Format. SciPy reads more of it, but a damaged file can end its process (1.17: a segmentation
fault), and it unpacks without a limit.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from cml_dist.tools.sources.tree import SourceTree

_MOST = 64 * 2**20  # bytes of a file, packed and unpacked; the published lists have less than a tenth
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR, _NUMERIC = 1, 2, 4, range(6, 16)
_EMPTY = np.empty(0)


def read_variable(tree: SourceTree, path: str, name: str) -> Any:
    """The variable of this name: a flat array, text, a list of a cell's parts, or of a struct a list for each field.

    Raises:
        DataError: naming the file, if it is damaged, or has no such variable.
    """
    with tree.open(path) as stream, tree.reading(path):
        data = stream.read(_MOST + 1)
        if data[124:128] != b"\0\1IM":
            raise ValueError("it is no MATLAB 5 file")
        for matrix in _matrices(data):
            flags, _, title, *parts = _elements(matrix)
            if bytes(title[1]) == name.encode():
                return _value(flags[1][0], parts)
        raise ValueError(f"it has no matrix {name}")


def _matrices(data: bytes) -> Iterator[memoryview]:
    """The matrices of a file, unpacked."""
    room = _MOST - len(data)
    for kind, part in _elements(memoryview(data)[128:]):
        unpacked = zlib.decompressobj().decompress(part, max(1, room + 1)) if kind == _COMPRESSED else b""
        room -= len(unpacked)
        if room < 0:
            raise ValueError(f"it unpacks to more than {_MOST // 2**20} MiB")
        kind, part = next(_elements(memoryview(unpacked)), (kind, part))
        if kind == _MATRIX:
            yield part


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Kind and content of each element."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # the small form: the size beside the kind, the content in the second word
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            start = at + 8
            end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > min(end, len(data)):
            raise ValueError("it is cut off")
        yield kind, data[start : start + size]
        at = end


def _matrix(part: tuple[int, memoryview]) -> Any:
    if part[0] != _MATRIX:
        raise ValueError(f"a part is of kind {part[0]}, not a matrix")
    if not len(part[1]):
        return _EMPTY
    flags, _, _, *parts = _elements(part[1])
    return _value(flags[1][0], parts)


def _value(class_number: int, parts: list[tuple[int, memoryview]]) -> Any:
    """The content of a matrix; its dimensions are left out, for the lists of image sets are rows."""
    if class_number == _CELL:
        return [_matrix(part) for part in parts]
    if class_number == _STRUCT:
        (_, width), (_, names), *parts = parts
        (length,) = struct.unpack("<i", width)
        text = bytes(names)
        fields = [text[at : at + length].split(b"\0")[0].decode() for at in range(0, len(text), length)]
        values = [_matrix(part) for part in parts]
        return {field: values[place :: len(fields)] for place, field in enumerate(fields)}
    ((kind, content),) = parts
    if class_number == _CHAR:
        return bytes(content).decode(_TEXTS[kind])
    if class_number in _NUMERIC:
        return np.frombuffer(content, _NUMBERS[kind])
    raise ValueError(f"it has a matrix of class {class_number}, which is neither numbers, text, a cell nor a struct")
