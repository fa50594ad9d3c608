"""An evaluation that was broken off goes on where it stood: an episode's score depends on no start, and no world."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cml_dist.run.folder import RunFolder, write_bytes

_NAME = ".unfinished-{}.npy"


class Unfinished:
    """Scores of one evaluation, kept in the run folder from start to start.

    Args:
        folder: of the run, whose configuration decides the scores too.
        what: whatever else does, as JSON values.
    """

    def __init__(self, folder: RunFolder, what: dict[str, Any]) -> None:
        self._folder = folder
        name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        self._file = _folder_of(folder) / _NAME.format(name)

    def read_into(self, table: Tensor) -> None:
        """Fill in what :meth:`write` kept of a table of this shape; nothing where there is none."""
        try:
            found = torch.from_numpy(np.load(self._file))
        except (OSError, ValueError, EOFError):  # none, or torn
            return
        if found.shape == table.shape:
            table.copy_(found)

    def write(self, table: Tensor) -> None:
        """Keep it. Raises CmlError where the file system refuses."""
        data = io.BytesIO()
        np.save(data, table.numpy())
        self._folder.check_ours()
        write_bytes(self._file, data.getvalue())


def forget_unfinished(folder: RunFolder) -> None:
    """The figures are written: what was kept on the way to them goes."""
    for path in _folder_of(folder).glob(_NAME.format("*")):
        path.unlink(missing_ok=True)


def _folder_of(folder: RunFolder) -> Path:
    return folder.own_eval_file.parent
