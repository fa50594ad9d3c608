"""Presets of ``--preset``: how long a run is, and nothing else; above the recipe, below the command line. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _length(steps: int, every: int, val_episodes: int, episodes: int) -> dict[str, Any]:
    return {
        "train.steps": steps,
        "eval.every": every,
        "eval.val_episodes": val_episodes,
        "eval.episodes": episodes,
        "checkpoint.every": every,
    }


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": _length(100, every=50, val_episodes=20, episodes=100),
    "standard": {},
    "paper": _length(30_000, every=500, val_episodes=400, episodes=10_000),
}
"""Settings by name: minutes on a CPU, to see that all works; the recipe's own; and the paper's protocol."""
