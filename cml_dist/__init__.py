"""cml_dist: distributed Cooperative Meta-Learning (MAML with a co-learner)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {"train": "api", "evaluate": "api", "load": "predict"}
"""Of ``cml_dist.run``, by function."""

__all__ = ["__version__", "evaluate", "load", "train"]


def __getattr__(name: str) -> Any:
    # Importing the package must not import torch: ``cml-dist --help`` answers at once.
    if name in _MODULES:
        return getattr(import_module(f"cml_dist.run.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
