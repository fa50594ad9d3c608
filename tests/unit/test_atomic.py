"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os

import pytest

from cml_dist.atomic import atomic_file, write_json
from cml_dist.errors import CmlError


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "made" / "file"
    write_json(path, {"a": 1})

    def called_off():
        assert path.read_text().startswith("{"), "not before the last moment"
        raise RuntimeError

    with pytest.raises(RuntimeError), atomic_file(path, called_off) as temporary:
        temporary.write_text("half")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CmlError, match="cannot write .*file: No space left on device; free space"):
        write_json(path, {"a": 2})
    assert os.listdir(path.parent) == ["file"] and path.read_text() == '{\n  "a": 1\n}\n'
