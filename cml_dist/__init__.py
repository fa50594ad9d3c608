"""cml_dist: distributed Cooperative Meta-Learning (MAML with a co-learner)."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Importing the package must not import torch: ``cml-dist --help`` answers at once.
    if name == "load":
        from cml_dist.run.predict import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
