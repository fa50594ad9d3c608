"""What a check finds, and how the findings of all processes become one list. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cml_dist.doctor.place import Place
from cml_dist.telemetry import text

Verdict = Literal["ok", "note", "warning", "fault"]
VERDICTS: tuple[Verdict, ...] = ("ok", "note", "warning", "fault")
"""From good to bad; only a fault fails."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: its name, a word or two.
        verdict: ``ok``; ``note``: worth knowing; ``warning``: works, but something will be lost; ``fault``: a run
            would fail or be wrong.
        value: what was found.
        remedy: what to do about it.
        amount, unit: a number in front of the value that may differ between processes without being another finding.
        beside: said after the value, but not where a deviating one is compared with it.
        alike: what to do if the value is not the same everywhere; empty where it may differ.
        brief: may be shown with others in one line while all is well.
        data: numbers, for ``--json``.
        group: heading under which it is shown; filled in by whoever runs the check.
    """

    check: str
    verdict: Verdict
    value: str
    remedy: str = ""
    amount: float | None = None
    unit: str = ""
    beside: str = ""
    alike: str = ""
    brief: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """A finding of one or more processes that found the same.

    Attributes:
        ranks: those processes.
        who: their names, where others found something else.
    """

    group: str
    check: str
    verdict: Verdict
    value: str
    remedy: str
    ranks: tuple[int, ...]
    who: str = ""
    brief: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(found: Mapping[int, Iterable[Finding]], places: Mapping[int, Place]) -> list[Row]:
    """Identical findings of several processes as one row; those that deviate by name, after the row of the majority."""
    by_check: dict[tuple[str, str], list[tuple[int, Finding]]] = {}
    for rank in sorted(found):
        for finding in found[rank]:
            by_check.setdefault((finding.group, finding.check), []).append((rank, finding))
    rows: list[Row] = []
    for entries in by_check.values():
        rows += _rows_of_one_check(entries, places)
    return rows


def _rows_of_one_check(entries: list[tuple[int, Finding]], places: Mapping[int, Place]) -> list[Row]:
    kinds: dict[tuple, list[tuple[int, Finding]]] = {}
    for rank, finding in entries:
        kinds.setdefault((finding.verdict, finding.value, finding.unit, finding.remedy), []).append((rank, finding))
    # The majority first; of equals the one that holds the lowest rank (a dictionary keeps that order, a sort too).
    ordered = sorted(kinds.values(), key=len, reverse=True)
    main = ordered[0][0][1]
    rows = []
    for number, kind in enumerate(ordered):
        finding = kind[0][1]
        ranks = tuple(rank for rank, _ in kind)
        value, verdict, remedy = _value(kind), finding.verdict, finding.remedy
        if number == 0 or not main.alike:
            value = f"{value} {finding.beside}".rstrip()
        else:
            value = f"{value} instead of {main.value}"
            verdict = max(verdict, "warning", key=VERDICTS.index)
            remedy = remedy or main.alike
        alone = len(ordered) == 1 or (number == 0 and verdict == "ok")
        rows.append(
            Row(
                group=finding.group,
                check=finding.check,
                verdict=verdict,
                value=value,
                remedy=remedy,
                ranks=ranks,
                who="" if alone else names(ranks, places),
                brief=finding.brief and len(ordered) == 1,
                data=finding.data,
            )
        )
    return rows


def _value(kind: list[tuple[int, Finding]]) -> str:
    """The value of processes that agree, with the range of their amounts."""
    finding = kind[0][1]
    amounts = [entry.amount for _, entry in kind if entry.amount is not None]
    if not amounts:
        return finding.value
    shown = dict.fromkeys(text.number(amount, 3) for amount in (min(amounts), max(amounts)))
    return f"{' to '.join(shown)} {finding.unit} {finding.value}".rstrip()


def names(ranks: Iterable[int], places: Mapping[int, Place]) -> str:
    """Processes by rank and machine, e.g. ``ranks 2 and 3 on n02``."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(places[rank].host if rank in places else "", []).append(rank)
    parts = []
    for host, members in by_host.items():
        word = "rank" if len(members) == 1 else "ranks"
        parts.append(f"{word} {listed(members)}" + (f" on {host}" if host else ""))
    return ", ".join(parts)


def listed(numbers: Iterable[int]) -> str:
    """Numbers in words, runs shortened: ``0 to 3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(number) for number in run]
    return " and ".join(parts) if len(parts) == 2 else ", ".join(parts)
