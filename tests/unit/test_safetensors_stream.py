"""Files written tensor by tensor are those that the safetensors library writes, and both read both."""

from __future__ import annotations

import random

import pytest
import safetensors.torch
import torch

from cml_dist.run.safetensors_stream import DTYPES, StreamReader, write_stream

USED = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def tensors(dtypes=USED):
    """Scalars, empty tensors, sizes that leave the next type unaligned, a view that is not contiguous."""
    made = {}
    for number, dtype in enumerate(dtypes):
        base = torch.arange(-7, 8).to(dtype)
        made |= {f"{number}/scalar": base[3], f"{number}/empty": base[:0].reshape(0, 4), f"{number}/odd": base}
        made[f"{number}/view"] = base.reshape(5, 3).t()
    return made


def apart(content):
    """The library takes neither views nor tensors that share memory."""
    return {name: t.clone(memory_format=torch.contiguous_format) for name, t in content.items()}


def write(path, content, metadata, order=None):
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in content.items()}
    write_stream(path, layout, ((name, content[name]) for name in order or content), lambda: metadata)


@pytest.mark.parametrize("dtypes", [USED, tuple(DTYPES.values())])
@pytest.mark.parametrize("length", range(9))
def test_a_file_is_the_library_s_own_to_the_byte(tmp_path, dtypes, length):
    """Whatever the order in which tensors come, and whatever the length of the header leaves to be padded."""
    content, metadata = tensors(dtypes), {"key": '"quoted" ü\n' + "x" * length}
    order = list(content)
    random.Random(length).shuffle(order)
    write(tmp_path / "ours", content, metadata, order)
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(apart(content), metadata)


def test_the_library_reads_ours_and_we_read_the_library_s(tmp_path):
    content = tensors()
    write(tmp_path / "ours", content, {"a": "1", "b": "2"})
    safetensors.torch.save_file(apart(content), tmp_path / "its", {"a": "1", "b": "2"})
    its_reading = safetensors.torch.load_file(tmp_path / "ours")
    reader = StreamReader(tmp_path / "its")
    assert reader.metadata == {"a": "1", "b": "2"}
    assert list(reader.layout) == sorted(content) and its_reading.keys() == content.keys()
    for name, tensor in content.items():
        for read in (its_reading[name], reader.read(name)):
            assert read.dtype == tensor.dtype and torch.equal(read, tensor), name


def test_a_reader_outlives_the_name_of_its_file(tmp_path):
    content = tensors()
    write(tmp_path / "file", content, {})
    reader = StreamReader(tmp_path / "file")
    (tmp_path / "file").unlink()
    assert torch.equal(reader.read("0/odd"), content["0/odd"])


def test_every_truncation_is_found(tmp_path):
    write(tmp_path / "whole", {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.int64)}, {"key": "value"})
    data = (tmp_path / "whole").read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(ValueError):
            StreamReader(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"x")
    with pytest.raises(ValueError, match="shorter or longer"):
        StreamReader(tmp_path / "cut")


def test_a_file_that_shrinks_while_it_is_read_is_found(tmp_path):
    write(tmp_path / "file", {"a": torch.ones(100_000)}, {})
    reader = StreamReader(tmp_path / "file")
    with open(tmp_path / "file", "r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match="ends within a"):
        reader.read("a")


@pytest.mark.parametrize(
    "other", [{}, {"a": torch.ones(3)}, {"a": torch.ones(2).double()}, {"a": torch.ones(2), "b": torch.ones(2)}]
)
def test_what_was_not_laid_out_is_refused(tmp_path, other):
    with pytest.raises((AssertionError, KeyError)):
        write_stream(tmp_path / "file", {"a": (torch.float32, (2,))}, other.items(), dict)
