"""A sweep: many runs of one configuration, from a file of axes to the name and the settings of each. Pure, no torch."""

from __future__ import annotations

import difflib
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from cml_dist.config.keys import as_yaml, flatten
from cml_dist.config.load import read_yaml
from cml_dist.config.schema import Place, Section
from cml_dist.errors import ConfigError

MANY = 500
"""Runs of a sweep that must be meant: more are asked about."""

LONGEST = 200
"""Characters of a run's name: a file's may have 255."""

Axis = list[tuple[str, dict[str, Any]]]
"""Of each of its points the part of a name, and the settings."""


@dataclass(frozen=True)
class Run:
    """One run: its name, which is that of its folder in ``dir``, and what it sets in the base."""

    name: str
    settings: dict[str, Any]

    @property
    def overrides(self) -> list[str]:
        """The settings as the command line of ``cml-dist train`` takes them."""
        return [f"{key}={as_yaml(value)}" for key, value in self.settings.items()]

    @property
    def variant(self) -> str:
        """What it has in common with the runs of other seeds."""
        return " ".join(word for word in self.overrides if not word.startswith("run.seed="))


class Range(Section):
    """Numbers between two bounds; whole ones where both bounds are."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="each order of magnitude is as likely as another")

    @model_validator(mode="after")
    def _can_be(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low is {self.low} and high is {self.high}; set low < high{', low > 0' * self.log}")
        return self

    def at(self, part: float) -> int | float:
        """The number so far up the range (0 to 1): of four digits, since it is part of a name."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        top = self.high + whole
        found = self.low * (top / self.low) ** part if self.log else self.low + part * (top - self.low)
        return min(math.floor(found), self.high) if whole else float(f"{found:.4g}")


class Draws(Section):
    """Settings drawn at random: the k-th value of a key follows from ``seed``, the key, its range and k alone."""

    draws: int = Field(ge=1)
    seed: int = 0
    ranges: dict[str, Range] = Field(min_length=1)

    def points(self) -> list[dict[str, Any]]:
        """The settings of each draw."""
        return [
            # A text as seed gives the same numbers in every version of Python.
            {key: limits.at(random.Random(f"{self.seed} {key} {k}").random()) for key, limits in self.ranges.items()}
            for k in range(self.draws)
        ]


class Sweep(Section):
    """What a sweep's file says; ``variants``, ``axes``, ``zip``, ``random`` and ``seeds`` are combined."""

    base: str = Field(description="a recipe or a file, as cml-dist train takes it")
    dir: Place = Field(description="holds a folder for each run")
    set: dict[str, Any] = Field({}, description="settings of all runs")
    variants: dict[str, dict[str, Any]] = Field({}, description="settings by a name of one's own")
    axes: dict[str, list[Any]] = Field({}, description="values of settings, in every combination")
    zip: dict[str, list[Any]] = Field({}, description="as axes, but the first values together, the second, ...")
    random: Draws | None = None
    seeds: list[int] = Field([], description="values of run.seed; a number: so many, from 0")

    @field_validator("seeds", mode="before")
    @classmethod
    def _from_0(cls, value: object) -> object:
        return list(range(value)) if type(value) is int else value

    @model_validator(mode="after")
    def _can_be(self) -> Sweep:
        keys = self._keys()
        if not keys:
            raise ValueError("nothing varies; give variants, axes, zip, random or seeds, e.g. seeds: 3")
        if empty := next((key for key, values in {**self.axes, **self.zip}.items() if not values), None):
            raise ValueError(f"{empty} has no values; give at least one")
        if odd := next((name for name in self.variants if not re.fullmatch(r"[\w+-][\w.+-]*", name)), None):
            raise ValueError(f"a variant is called {odd!r}; use letters, digits and . _ + - (it names folders)")
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"{twice} varies in two places; name it in one")
        if len({len(values) for values in self.zip.values()}) > 1:
            counts = ", ".join(f"{len(values)} of {key}" for key, values in self.zip.items())
            raise ValueError(f"zip has {counts}; give as many values of each")
        if "run.dir" in {*keys, *flatten(self.set), *(key for own in self.variants.values() for key in flatten(own))}:
            raise ValueError("run.dir is set; the sweep's dir says where its runs are")
        return self

    def _keys(self) -> list[str]:
        drawn = self.random.ranges if self.random else ()
        named, seeds = bool(self.variants), bool(self.seeds)
        return [*["variants"] * named, *self.axes, *self.zip, *drawn, *["run.seed"] * seeds]

    def identity(self) -> dict[str, Any]:
        """What stays as it is where values, variants, draws or seeds are added; names of runs follow from it."""
        drawn = self.random.model_dump(exclude={"draws"}) if self.random else None
        return {"base": self.base, "what varies": ", ".join(self._keys()), "random": drawn}

    def count(self) -> int:
        """How many runs there are, but for values that are named twice."""
        return math.prod(map(len, self._axes()))

    def runs(self) -> list[Run]:
        """Every run once; the last axis changes first. Names stay when values are added.

        Raises:
            ConfigError: two runs have one name, or a name is too long.
        """
        found: dict[str, Run] = {}
        for points in product(*self._axes()):
            settings = flatten(self.set)
            for _, own in points:
                settings |= own
            run = Run(",".join(name for name, _ in points), settings)
            remedy = "give their values names of your own, by variants"
            if found.setdefault(run.name, run).overrides != run.overrides:
                raise ConfigError(f"two different runs of the sweep are called {run.name}", remedy)
            if len(run.name) > LONGEST:
                raise ConfigError(f"a run's name has {len(run.name)} characters: {run.name}", remedy)
        return list(found.values())

    def _axes(self) -> list[Axis]:
        keys = self._keys()
        last = [key.rpartition(".")[2] for key in keys]
        known = {word for word in last if last.count(word) == 1} - {"name"}  # which says little without its section
        short = {key: word if word in known else key for key, word in zip(keys, last, strict=True)}

        def axis(points: list[dict[str, Any]]) -> Axis:
            names = [",".join(f"{short[key]}={as_yaml(value)}" for key, value in point.items()) for point in points]
            return [(re.sub(r"[^\w.,=+-]+", "_", name), point) for name, point in zip(names, points, strict=True)]

        together = [dict(zip(self.zip, row, strict=True)) for row in zip(*self.zip.values(), strict=True)]
        found = [[(name, flatten(settings)) for name, settings in self.variants.items()]]
        found += [axis([{key: value} for value in values]) for key, values in self.axes.items()]
        found += [axis(together), axis(self.random.points() if self.random else [])]
        found += [axis([{"run.seed": seed} for seed in self.seeds])]
        return [points for points in found if points]


def read_sweep(path: str | Path) -> Sweep:
    """The sweep in a YAML file.

    Raises:
        ConfigError: it cannot be read, or says what cannot be; with the nearest name of an unknown key.
    """
    return parse_sweep(read_yaml(Path(path).expanduser()), str(path))


def parse_sweep(data: Mapping[str, Any], source: str) -> Sweep:
    """The sweep in plain ``data``; every fault in one ConfigError."""
    try:
        return Sweep.model_validate(data)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            key, message = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                near = difflib.get_close_matches(key, Sweep.model_fields, n=1) or [" or ".join(Sweep.model_fields)]
                message = f"no key of a sweep; use {near[0]}"
            faults.append(f"{key}: {message[:1].lower()}{message[1:]}" if key else message)
        what, _, remedy = "; ".join(faults).partition("; ")
        raise ConfigError(f"{source}: {what}", remedy or "see docs/how-to/sweeps.md") from error
