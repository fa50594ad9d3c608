"""A table of the paper as data: rows, what was published of them, and the settings that train them. Pure, no torch."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cml_dist.config.keys import flatten
from cml_dist.config.load import load_config, merge, read_yaml
from cml_dist.config.schema import RunConfig, Section
from cml_dist.config.sweep import Run, Sweep
from cml_dist.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
_TABLES = (_PACKAGE / "repro", _PACKAGE.parent / "configs" / "repro")
"""Installed (setup.py puts the tables there), or in a checkout."""

LEAST_VALIDATIONS = 10
"""A shortened run has as many at least, if its recipe has: the best step is chosen among them."""


def _as_pair(value: object) -> object:
    return (value, None) if isinstance(value, (int, float)) else value


Figure = Annotated[tuple[float, float | None], BeforeValidator(_as_pair)]
"""A score and its published spread, in per cent or as MSE."""


class Rerun(Section):
    """What somebody else found who ran a row's baseline or its like."""

    score: float
    by: str = Field(min_length=1, description="who, and with which settings")


class Row(Section):
    """One row: a run for each seed, tested by one learner or two."""

    recipe: str = Field("", description="what settings are differences to; empty: the table's")
    set: dict[str, Any] = Field({}, description="settings, flat")
    baseline: str | None = Field(None, description="the row that it is claimed to be above")
    published: dict[Literal["meta", "co"], Figure] = Field({}, description="by learner: meta (CML), co (CML-dagger)")
    reruns: tuple[Rerun, ...] = ()
    sources: dict[str, str] = Field({}, description="of settings, by key or pattern: where each is from")
    quirks: dict[str, str] = Field({}, description="of the released code: kept or dropped, and why")
    absent: str = Field("", description="why the row cannot be run here")


class Table(Section):
    """What a file of ``configs/repro`` says; ``recipe``, ``set``, ``sources`` and ``quirks`` count for all its rows.

    A file's ``like`` names a shipped table whose sources and quirks count for it too, below its own.
    """

    title: str
    about: str
    recipe: str = ""
    set: dict[str, Any] = {}
    seeds: int = Field(3, ge=1, description="runs of each row, unless --seeds says another number")
    sources: dict[str, str] = {}
    quirks: dict[str, str] = {}
    borrows: dict[str, list[str]] = Field({}, description="rows of other tables, by table; their runs are shared")
    rows: dict[Annotated[str, Field(pattern=r"^[\w+-][\w.+-]*$")], Row] = Field(min_length=1)

    @model_validator(mode="after")
    def _can_be(self) -> Table:
        borrowed = [name for names in self.borrows.values() for name in names]
        for name, row in self.rows.items():
            if not (row.recipe or self.recipe):
                raise ValueError(f"row {name} has no recipe, and the table neither")
            if row.baseline not in (None, *self.rows, *borrowed):
                raise ValueError(f"row {name} has the baseline {row.baseline}, which is no row")
            for key in {**self.set, **row.set}:
                if not any(fnmatch.fnmatchcase(key, known) for known in {**self.sources, **row.sources}):
                    raise ValueError(f"row {name} sets {key}, and no source says where that is from; 'ours' is one")
        return self


def tables() -> dict[str, Path]:
    """Every shipped table by its name, in order of name."""
    found = ({path.stem: path for path in sorted(place.glob("*.yaml"))} for place in _TABLES)
    return next(filter(None, found), {})


def find_table(name: str) -> Table:
    """A shipped table by its name, or one of your own by the path of its file; with the rows that it borrows.

    Raises:
        ConfigError: there is none, with the nearest names; or it says what cannot be.
    """
    known, path = tables(), Path(name).expanduser()
    if name not in known and not path.is_file():
        near = " or ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4))
        raise ConfigError(f"there is no table {name}", f"did you mean {near}?" if near else f"use {', '.join(known)}")
    try:
        table = Table.model_validate(_read(name, known.get(name, path)))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise ConfigError(f"table {name}: {place}: {fault['msg'].removeprefix('Value error, ')}", "mend it") from error
    rows = {row: _borrowed(name, of, row) for of, names in table.borrows.items() for row in names}
    for row, own in table.rows.items():
        theirs, ours = own.model_dump(), table.model_dump(include={"set", "sources", "quirks"})
        both = {key: {**all_rows, **theirs[key]} for key, all_rows in ours.items()}
        rows[row] = Row.model_validate({**theirs, **both, "recipe": own.recipe or table.recipe})
    return table.model_copy(update={"rows": rows, "borrows": {}})


def _read(name: str, path: Path) -> dict[str, Any]:
    """A table's file with the sources and quirks of the one that it is like."""
    data = read_yaml(path)
    if (like := data.pop("like", None)) is not None:
        other = _read(like, _shipped(name, "is like", str(like)))
        for key in ("sources", "quirks"):
            if isinstance(own := data.get(key) or {}, dict):
                data[key] = {**other.get(key, {}), **own}
    return data


def _shipped(table: str, does: str, of: str) -> Path:
    if of not in tables():
        raise ConfigError(f"table {table} {does} {of}", f"use a shipped one: {', '.join(tables())}")
    return tables()[of]


def _borrowed(table: str, of: str, row: str) -> Row:
    """A row of a shipped table."""
    _shipped(table, "borrows from", of)
    rows = find_table(of).rows
    if row not in rows:
        near = difflib.get_close_matches(row, rows, n=3, cutoff=0.4) or rows
        raise ConfigError(f"table {table} borrows the row {row}, which {of} has not", f"use {' or '.join(near)}")
    return rows[row]


def chosen(table: Table, pattern: str | None) -> dict[str, Row]:
    """The rows whose name matches a pattern or has it in it, with their baselines; None: all.

    Raises:
        ConfigError: there is none; the nearest names are given.
    """
    if pattern is None:
        return table.rows
    names = [name for name in table.rows if name == pattern]
    names = names or [name for name in table.rows if fnmatch.fnmatchcase(name, pattern) or pattern in name]
    if not names:
        near = " or ".join(difflib.get_close_matches(pattern, table.rows, n=3, cutoff=0.4))
        rows = f"did you mean {near}?" if near else f"use a part of one of {', '.join(table.rows)}"
        raise ConfigError(f"no row matches {pattern!r}", rows)
    wanted = {*names, *(table.rows[name].baseline for name in names)}
    return {name: row for name, row in table.rows.items() if name in wanted}


# --------------------------------------------------------------------------- what trains a row


def settings_of(row: Row, data: str, budget: float = 1.0, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings, flat, by which a row is trained from its recipe.

    Args:
        data: the folder that stands for ``data/`` in the recipes.
        budget: fraction of the row's own length, above 0 and at most 1.
        overrides: ``key=value``, above all others.
    """
    settings = flatten(row.set)
    config = load_config(row.recipe, Run("", settings).overrides)
    root = getattr(config.domain, "root", None) or ""
    if root.startswith("data/"):
        settings["domain.root"] = f"{data.rstrip('/')}/{root.removeprefix('data/')}"
    settings |= shortened(config, budget) | flatten(merge({}, overrides))
    for key, option in {"run.dir": "--out", "run.seed": "--seeds"}.items():
        if key in settings:
            raise ConfigError(f"{key} is set, and a table has many runs", f"leave it out; {option} says it for all")
    return settings


def shortened(config: RunConfig, budget: float) -> dict[str, Any]:
    """The settings by which a run takes a fraction of its meta-steps, its schedules too; none where it takes all.

    Validations become fewer in the same proportion, down to ``LEAST_VALIDATIONS``. The test stays as it is.
    """
    if budget == 1:
        return {}
    steps = max(1, round(budget * config.train.steps))
    scaled = {"train.steps": steps}
    if config.eval.every:
        least = min(LEAST_VALIDATIONS, config.num_validations)
        validations = max(least, round(budget * config.num_validations))
        scaled["eval.every"] = max(1, math.ceil(steps / validations))
    method, optim = config.method, config.optim
    lengths = {
        "method.multi_step_loss": method.multi_step_loss,
        "method.multi_step_every": method.multi_step_every if method.multi_step_loss else 0,
        "method.first_order_steps": method.first_order_steps,
        "optim.warmup_steps": optim.warmup_steps,
        "optim.step_every": optim.step_every if optim.schedule == "step" else 0,
    }
    return scaled | {key: max(1, round(budget * length)) for key, length in lengths.items() if length}


def place_of(out: str, budget: float) -> Path:
    """Where the runs of a budget are: a folder for each recipe, and in it one for each row and seed."""
    return Path(out, "full" if budget == 1 else f"budget-{budget:g}")


def sweeps_of(
    rows: Mapping[str, Row], seeds: int, out: str, data: str, budget: float = 1.0, overrides: Sequence[str] = ()
) -> list[Sweep]:
    """A sweep for each recipe of these rows, whose variants are the rows."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in rows.items():
        found.setdefault(row.recipe, {})[name] = settings_of(row, data, budget, overrides)
    place = place_of(out, budget)
    return [
        Sweep(base=recipe, dir=str(place / Path(recipe).stem), variants=variants, seeds=[*range(seeds)])
        for recipe, variants in found.items()
    ]
