"""A domain of the user's own: ``NAME(config, seeds, **domain.options)``, and the contract that it is held to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor

from cml_dist.config.schema import OwnDomainConfig
from cml_dist.data.base import SPLITS, Domain, Progress
from cml_dist.errors import ConfigError, DataError
from cml_dist.types import Batch, Episode
from cml_dist.user_code import blamed, load, unsealed


def own_class(name: str) -> type[Domain]:
    """The class that a name of code means.

    Raises:
        ConfigError: it cannot be imported, is no domain, or needs data to say what its loss is.
    """
    cls = load(name)
    if not (isinstance(cls, type) and issubclass(cls, Domain)):
        raise ConfigError(
            f"domain.name {unsealed(name)} is no domain", "make it a subclass of cml_dist.data.base.Domain"
        )
    for what in ("loss", "score"):
        if not isinstance(inspect.getattr_static(cls, what), staticmethod):
            raise ConfigError(
                f"{unsealed(name)} has no static method {what}",
                f"write @staticmethod above {what}(outputs, targets): an exported model asks for it without data",
            )
    return cls


def build(
    config: OwnDomainConfig, seeds: Mapping[str, int], processes: int = 1, progress: Progress | None = None
) -> Domain:
    """The domain, which has kept its contract on the first episodes of each split.

    Raises:
        ConfigError: as :func:`own_class`, or its code fails (with file and line). DataError: it breaks the contract.
    """
    cls, name = own_class(config.name), unsealed(config.name)
    with blamed(config.name, "fails in a trial"):
        domain = cls(config, seeds, **config.options)
        for split in SPLITS:
            first = domain.episode(split, 0)
            domain.episode(split, 1)
            if not _same(first, domain.episode(split, 0)):
                raise DataError(
                    f"{name} gives another episode where 0 of {split} is asked for again",
                    "draw all of it from cml_dist.data.base.episode_rng(seeds[split], split, index)",
                )
            _check_counts(config, name, first)
            prepared = domain.prepare(first, torch.device("cpu"), torch.float32)
            parts = {"support set": prepared.support, "query set": prepared.query}
            if (grid := domain.prepared_grid(split, 0, torch.device("cpu"), torch.float32)) is not None:
                parts["grid"] = grid
            for part, batch in parts.items():
                _check_prepared(domain, f"{name} prepares the {part} of {split}", batch, config.ways)
    return domain


def _tensors(episode: Episode) -> list[Tensor]:
    return [*episode.support.tensors(), *episode.query.tensors()]


def _same(a: Episode, b: Episode) -> bool:
    pairs = list(zip(_tensors(a), _tensors(b), strict=False))
    return len(_tensors(a)) == len(_tensors(b)) and all(torch.equal(x, y) for x, y in pairs)


def _check_counts(config: OwnDomainConfig, name: str, episode: Episode) -> None:
    """As many examples (of each class) as the settings say: memory is planned by them."""
    if episode.ways != config.ways:
        raise DataError(f"{name} gives episodes of ways {episode.ways}, not {config.ways}", "pass ways=config.ways on")
    for key, batch, each in (("shots", episode.support, config.shots), ("queries", episode.query, config.queries)):
        found = [len(batch.inputs)]
        if config.ways:
            found = [int((batch.targets == label).sum()) for label in range(config.ways)]
        if set(found) != {each} or len(batch.targets) != len(batch.inputs) or sum(found) != len(batch.inputs):
            of = "examples of the classes" if config.ways else "examples"
            raise DataError(
                f"{name} gives {len(batch.inputs)} inputs, {len(batch.targets)} targets and {found} {of}, but "
                f"domain.{key} is {each}",
                f"give {each} of each of the classes 0 to {config.ways - 1}" if config.ways else f"give {each}",
            )


def _check_prepared(domain: Domain, what: str, batch: Batch, ways: int) -> None:
    count, inputs, targets = len(batch.targets), batch.inputs, batch.targets
    wanted = (count,) if ways else (count, domain.output_dim)
    as_wanted = {
        f"inputs as {inputs.dtype}, not in the type that is asked for": inputs.dtype == torch.float32,
        f"inputs of shape {tuple(inputs.shape)}, not {(count, *domain.input_shape)}": inputs.shape[1:]
        == tuple(domain.input_shape),
        "inputs that are not finite": bool(inputs.isfinite().all()),
        f"targets of shape {tuple(targets.shape)}, not {wanted}": tuple(targets.shape) == wanted,
        f"targets as {targets.dtype}": targets.dtype == (torch.int64 if ways else torch.float32),
        f"outputs for {domain.output_dim} classes, not {ways}": not ways or domain.output_dim == ways,
    }
    for fault, fine in as_wanted.items():
        if not fine:
            raise DataError(f"{what} with {fault}", "see Domain.prepare in cml_dist/data/base.py")
    outputs = torch.randn(count, domain.output_dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for name in ("loss", "score"):
        value = getattr(domain, name)(outputs, targets)
        if value.shape != () or value.requires_grad != (name == "loss"):
            raise DataError(
                f"{what}, and its {name} has shape {tuple(value.shape)}"
                + (" without a graph" if not value.requires_grad else " with a graph"),
                "give the mean over the examples, a scalar; of outputs.detach() for the score",
            )
