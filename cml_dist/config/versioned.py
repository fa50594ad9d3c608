"""Settings that say by which version of a rule a run goes on: an earlier run keeps the one that it began with."""

from __future__ import annotations

from typing import Any

RunConfig = Any  # schema.RunConfig

BEFORE: dict[str, Any] = {
    "domain.draw": 1, "domain.features": "compute", "domain.size": "set", "domain.statistics": "set",
    "optim.step_from": "start",
}  # fmt: skip
"""What a run folder or checkpoint means that does not name them: it is older than they are."""

NEWEST: dict[str, Any] = {
    "domain.draw": 2, "domain.features": "keep", "domain.size": "weights", "domain.statistics": "weights",
    "optim.step_from": "warmup",
}  # fmt: skip
"""Of new runs."""


def versions_of(config: RunConfig) -> dict[str, Any]:
    """The settings of this kind that a configuration has; a domain of the user's own draws by its own rule."""
    found = {}
    for key in NEWEST:
        section, name = key.split(".")
        if hasattr(own := getattr(config, section), name):
            found[key] = getattr(own, name)
    return found


def settled(config: RunConfig, versions: dict[str, Any]) -> RunConfig:
    """The configuration with ``versions`` where it leaves them open."""
    for key in (key for key, value in versions_of(config).items() if value is None):
        section, name = key.split(".")
        own = getattr(config, section).model_copy(update={name: versions.get(key, NEWEST[key])})
        config = config.model_copy(update={section: own})
    return config
