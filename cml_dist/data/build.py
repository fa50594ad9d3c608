"""From ``domain.name`` to the domain that ``registry.DOMAINS`` names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from cml_dist.data.base import SPLITS, Domain, ModelInputs, Progress
from cml_dist.errors import ConfigError
from cml_dist.registry import DOMAINS, OWN_DOMAIN
from cml_dist.user_code import is_code


def build_domain(
    config: Any,
    *,
    train_seed: int,
    eval_seed: int,
    processes: int = 1,
    progress: Progress | None = None,
    splits: Collection[str] = SPLITS,
    trained: ModelInputs | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Domain:
    """The domain that the configuration names.

    Args:
        config: the ``domain`` section, one of ``config.schema.DomainConfig``.
        train_seed: chooses the training episodes.
        eval_seed: chooses the val and test episodes.
        processes: how many on this machine hold the same data: they share its memory.
        progress: called as ``progress(done, total, what)`` while data are made, fetched or decoded.
        splits: those of which episodes will be asked for; data need to have no others.
        trained: what a model reads that is there already, see :meth:`Domain.adopt`.
        tell: hears what that says, and the domain's remarks.

    Raises:
        ConfigError: if no domain has this name.
        DataError: if its data are missing, damaged, too few, or not what the trained model reads.

    *Collective*: none; processes that build at once share what is cached.
    """
    entry = OWN_DOMAIN if is_code(config.name) else DOMAINS.get(config.name)
    if entry is None:
        raise ConfigError(f"domain.name is {config.name!r}", f"use one of {', '.join(DOMAINS)}")
    seeds = {"train": train_seed, "val": eval_seed, "test": eval_seed}
    domain = entry.load()(config, seeds, processes, progress)
    if trained is not None and (said := domain.adopt(trained)) is not None:
        tell(said)
    for remark in domain.remarks:
        tell(remark)
    domain.check_splits(splits)
    return domain
