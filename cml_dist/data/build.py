"""From ``domain.name`` to the domain that ``registry.DOMAINS`` names."""

from __future__ import annotations

from typing import Any

from cml_dist.data.base import Domain, Progress
from cml_dist.errors import ConfigError
from cml_dist.registry import DOMAINS, OWN_DOMAIN
from cml_dist.user_code import is_code


def build_domain(
    config: Any, *, train_seed: int, eval_seed: int, processes: int = 1, progress: Progress | None = None
) -> Domain:
    """The domain that the configuration names.

    Args:
        config: the ``domain`` section, one of ``config.schema.DomainConfig``.
        train_seed: chooses the training episodes.
        eval_seed: chooses the val and test episodes.
        processes: how many on this machine hold the same data: they share its memory.
        progress: called as ``progress(done, total, what)`` while data are made, fetched or decoded.

    Raises:
        ConfigError: if no domain has this name.
        DataError: if its data are missing, damaged or too few.

    *Collective*: none; processes that build at once share what is cached.
    """
    entry = OWN_DOMAIN if is_code(config.name) else DOMAINS.get(config.name)
    if entry is None:
        raise ConfigError(f"domain.name is {config.name!r}", f"use one of {', '.join(DOMAINS)}")
    seeds = {"train": train_seed, "val": eval_seed, "test": eval_seed}
    return entry.load()(config, seeds, processes, progress)
