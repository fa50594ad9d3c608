"""What is looked at, what is found, and how the findings of all ranks become one list. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cml_dist.config.schema import RunConfig
from cml_dist.distributed.env import Launched

if TYPE_CHECKING:
    from cml_dist.distributed.world import World

Verdict = Literal["ok", "note", "warning", "fault"]


@dataclass
class Case:
    """What is looked at: a configuration (by name; None: a small one stands for it), a run folder, and this process.

    Attributes:
        world: once it is joined.
    """

    config: RunConfig
    configuration: str | None
    run_dir: Path
    here: Launched
    world: World | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; in a report, by all ranks that found the same.

    Attributes:
        check: its name, a word or two.
        verdict: ``ok``; ``note``: worth knowing; ``warning``: works, but something will be lost; ``fault``: a run
            would fail or be wrong.
        value: what was found.
        remedy: what to do about it.
        alike: what to do if the value is not the same everywhere; empty where it may differ.
        ranks, who: who found it; their names where not all found the same.
    """

    check: str
    verdict: Verdict
    value: str
    remedy: str = ""
    alike: str = ""
    ranks: tuple[int, ...] = ()
    who: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.check}: " + (f"{self.who}: " if self.who else "") + self.value + remedy


def judged(check: str, value: str, wrong: bool, remedy: str, verdict: Verdict = "warning", alike: str = "") -> Finding:
    """``ok``; or where something is ``wrong``, the verdict and what to do."""
    return Finding(check, verdict, value, remedy, alike) if wrong else Finding(check, "ok", value, alike=alike)


def merge(everyone: Sequence[tuple[str, Iterable[Finding]]]) -> list[Finding]:
    """The findings of all ranks, given as (host, findings): equal ones once, what most ranks found before the others.

    Who deviates is named, and warned of a value that must be the same everywhere.
    """
    checks: dict[str, dict[Finding, list[int]]] = {}
    for rank, (_, findings) in enumerate(everyone):
        for finding in findings:
            checks.setdefault(finding.check, {}).setdefault(finding, []).append(rank)
    rows: list[Finding] = []
    for found in checks.values():
        usual = max(found, key=lambda kind: len(found[kind]))
        for kind, ranks in sorted(found.items(), key=lambda one: one[0] != usual):
            row = replace(kind, ranks=tuple(ranks))
            if len(found) > 1 or (kind.verdict != "ok" and len(ranks) < len(everyone)):
                names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                row = replace(row, who=f"{names} {by_host(everyone[rank][0] for rank in ranks)}")
            if kind != usual and kind.alike and kind.verdict != "fault":
                value = f"{kind.value} instead of {usual.value}"
                row = replace(row, verdict="warning", value=value, remedy=kind.alike)
            rows.append(row)
    return rows


def by_host(hosts: Iterable[str]) -> str:
    """Where ranks are: ``on n01``, or with how many each ``on n01 (8), n02 (8)``."""
    counts = Counter(hosts)
    return "on " + ", ".join(f"{host} ({count})" if len(counts) > 1 else host for host, count in counts.items())
