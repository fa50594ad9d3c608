"""Where the launch files are: ``launch/`` of a checkout, or the copies that an installation carries."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "launch", _PACKAGE.parent / "launch")
"""Installed (setup.py puts the files there), or in a checkout, also an editable one."""


def launch_folder() -> Path:
    """The folder that holds ``accelerate/*.yaml`` and ``slurm/*``."""
    return next(place for place in _PLACES if (place / "slurm").is_dir())


def accelerate_files() -> list[str]:
    """The names of the shipped Accelerate files, e.g. ``zero2``, in order."""
    return sorted(path.stem for path in (launch_folder() / "accelerate").glob("*.yaml"))
