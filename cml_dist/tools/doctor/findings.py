"""What is looked at, what is found, and how the findings of all ranks become one report. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cml_dist.config.schema import RunConfig
from cml_dist.distributed.env import Launched

if TYPE_CHECKING:
    from cml_dist.distributed.world import World

Verdict = Literal["ok", "note", "warning", "fault"]
VERDICTS: tuple[Verdict, ...] = ("ok", "note", "warning", "fault")
"""From good to bad; only a fault makes a world not ready."""

GIB = 2**30


@dataclass
class Case:
    """What is looked at.

    Attributes:
        config: of the run that is to come; where none was named, a small one that carries settings of the world.
        configuration: its name; None where none was named.
        run_dir: the folder to look at.
        here: this process among all.
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
        brief: shares a line with others while all is well.
        data: numbers, for ``--json``.
        group: heading under which it is shown.
        ranks: who found it.
        who: their names, where others found something else.
    """

    check: str
    verdict: Verdict
    value: str
    remedy: str = ""
    alike: str = ""
    brief: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    ranks: tuple[int, ...] = ()
    who: str = ""


@dataclass(frozen=True)
class Report:
    """The findings of a world.

    Attributes:
        rows: of all ranks, merged.
        hosts: the machine of each rank that was heard of.
        case: what was looked at.
        seconds: how long it took.
    """

    rows: list[Finding]
    hosts: Mapping[int, str]
    case: Case
    seconds: float

    def of(self, verdict: str) -> list[Finding]:
        return [row for row in self.rows if row.verdict == verdict]

    @property
    def ready(self) -> bool:
        """Whether nothing stands in the way of a run; warnings do not."""
        return not self.of("fault")

    def groups(self) -> dict[str, list[Finding]]:
        """The rows under their headings; brief ones share the last line of theirs."""
        found: dict[str, list[Finding]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        for group, rows in found.items():
            brief = [row for row in rows if row.brief and row.verdict == "ok" and not row.who]
            if brief:
                value = ", ".join(f"{row.check} {row.value}" for row in brief)
                found[group] = [*(row for row in rows if row not in brief), Finding("others", "ok", value)]
        return found

    def head(self) -> dict[str, str]:
        """What was looked at, for the top."""
        size = self.case.here.size
        where = by_host(self.hosts) if len(self.hosts) == size else "(not joined)"
        return {
            "world": f"{counted(size, 'process')} {where}",
            "configuration": self.case.configuration or "none named: that of glyphs stands for it, without data",
            "run folder": str(self.case.run_dir),
        }

    def verdict(self) -> str:
        """The last line."""
        warnings = len(self.of("warning"))
        beside = f", with {counted(warnings, 'warning')}" if warnings else ""
        said = "Ready" if self.ready else f"Not ready: {counted(len(self.of('fault')), 'fault')}"
        return f"{said}{beside} ({self.seconds:.0f} s)"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        processes = [{"rank": rank, "host": host} for rank, host in self.hosts.items()]
        keys = ("group", "check", "verdict", "value", "remedy", "ranks", "who", "data")
        return {
            "ready": self.ready,
            "verdict": self.verdict(),
            "world": {"size": self.case.here.size, "processes": processes},
            "configuration": self.case.configuration,
            "run_dir": str(self.case.run_dir),
            "seconds": self.seconds,
            "counts": {verdict: len(self.of(verdict)) for verdict in VERDICTS},
            "findings": [{key: getattr(row, key) for key in keys} for row in self.rows],
        }


def merge(found: Mapping[int, Iterable[Finding]], hosts: Mapping[int, str]) -> list[Finding]:
    """Identical findings of several ranks as one; those that deviate by name, after that of the majority.

    Where values may differ, one rank's stands for all that are well.
    """
    by_check: dict[tuple[str, str], dict[tuple, list[tuple[int, Finding]]]] = {}
    for rank, findings in sorted(found.items()):
        for one in findings:
            same = one.value if one.alike or one.verdict != "ok" else ""
            kinds = by_check.setdefault((one.group, one.check), {})
            kinds.setdefault((one.verdict, same, one.remedy), []).append((rank, one))
    rows: list[Finding] = []
    for kinds in by_check.values():
        majority, *others = sorted(kinds.values(), key=len, reverse=True)  # of equals, that of the lowest rank
        first = _row(majority, hosts, named=bool(others) and majority[0][1].verdict != "ok")
        rows.append(first)
        for row in (_row(kind, hosts, named=True) for kind in others):
            if row.alike:
                verdict = max(row.verdict, "warning", key=VERDICTS.index)
                value, remedy = f"{row.value} instead of {first.value}", row.remedy or row.alike
                row = replace(row, verdict=verdict, value=value, remedy=remedy)
            rows.append(row)
    return rows


def _row(kind: list[tuple[int, Finding]], hosts: Mapping[int, str], named: bool) -> Finding:
    """The finding of ranks that agree; ``who`` is e.g. ``rank 1 on n01, ranks 2, 3 on n02``."""
    ranks, finding = tuple(rank for rank, _ in kind), kind[0][1]
    differ = any(one.value != finding.value for _, one in kind)
    members: dict[str, list[str]] = {}
    for rank in ranks[:1] if differ else ranks if named else ():
        members.setdefault(hosts[rank], []).append(str(rank))
    who = ", ".join(f"rank{'s' * (len(some) > 1)} {', '.join(some)} on {host}" for host, some in members.items())
    return replace(finding, ranks=ranks, who=f"e.g. {who}" if differ else who)


def by_host(hosts: Mapping[int, str]) -> str:
    """Where ranks are: ``on n01``, or with how many each ``on n01 (8), n02 (8)``."""
    counts = Counter(hosts.values())
    return "on " + ", ".join(f"{host} ({count})" if len(counts) > 1 else host for host, count in counts.items())


def counted(number: int, thing: str) -> str:
    """``1 process``, ``2 processes``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}{'es' if thing.endswith('s') else 's'}"
