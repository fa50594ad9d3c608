"""The shape of an episode where a configuration leaves it open (null): it is settled before a run begins. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

RunConfig = Any  # schema.RunConfig

MOST = {"ways": 5, "shots": 5, "queries": 15}
"""The shape that follows from a set with enough of everything."""


def open_keys(config: RunConfig) -> list[str]:
    """Which of ``domain.ways``, ``shots`` and ``queries`` are left open."""
    return [key for key in MOST if getattr(config.domain, key, key) is None]


def with_shape(config: RunConfig, shape: Mapping[str, Any]) -> RunConfig:
    """The configuration with ``shape`` where it leaves that open."""
    update = {key: shape[key] for key in open_keys(config) if key in shape}
    return config.model_copy(update={"domain": config.domain.model_copy(update=update)}) if update else config


def shape_for(config: RunConfig, classes: int, fits: Callable[[int, int], bool]) -> RunConfig:
    """The configuration with a shape for splits of at least so many classes.

    Where shots and queries are both open and images few, they get half of them each.

    Args:
        fits: whether each class can fill so many shots and queries.
    """

    def most(key: str, fits: Callable[[int], bool]) -> int:
        return next(filter(fits, range(MOST[key], 1, -1)), 1)

    domain = config.domain
    shots = domain.shots or most("shots", lambda shots: fits(shots, domain.queries or shots))
    queries = most("queries", lambda queries: fits(shots, queries))
    return with_shape(config, {"ways": min(MOST["ways"], classes), "shots": shots, "queries": queries})
