"""All that was found, as one verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cml_dist.doctor.findings import VERDICTS, Row, listed
from cml_dist.doctor.place import Place


@dataclass(frozen=True)
class Report:
    """The findings of a world.

    Attributes:
        rows: of all processes, merged.
        places: the processes that were heard of.
        run_dir: the folder that was looked at.
        configuration: its name; None where none was given.
        seconds: that it took.
    """

    rows: tuple[Row, ...]
    places: dict[int, Place]
    run_dir: str
    configuration: str | None
    seconds: float

    def of(self, verdict: str) -> list[Row]:
        return [row for row in self.rows if row.verdict == verdict]

    @property
    def ready(self) -> bool:
        """Whether nothing stands in the way of a run; warnings do not."""
        return not self.of("fault")

    @property
    def exit_code(self) -> int:
        return 0 if self.ready else 1

    def groups(self) -> dict[str, list[Row]]:
        """The rows under their headings; brief ones that are well as one at the end of theirs."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return {group: _shortened(rows) for group, rows in found.items()}

    def head(self) -> dict[str, str]:
        """What was looked at, for the top."""
        hosts: dict[str, list[int]] = {}
        for place in self.places.values():
            hosts.setdefault(place.host, []).append(place.rank)
        size = self.places[0].size
        world = f"{size} process{'es' * (size != 1)}" + (f" by {self.places[0].launcher}" if size > 1 else "")
        if len(hosts) == 1:
            world += f" on {next(iter(hosts))}"
        else:
            world += f" on {len(hosts)} machines: " + ", ".join(
                f"{host} ({'rank' if len(ranks) == 1 else 'ranks'} {listed(ranks)})" for host, ranks in hosts.items()
            )
        return {
            "world": world,
            "configuration": self.configuration or "none named: backbone and data of a run are not checked",
            "run folder": self.run_dir,
        }

    def verdict(self) -> str:
        """The last word."""
        warnings = len(self.of("warning"))
        beside = f", with {_count(warnings, 'warning')}" if warnings else ""
        if self.ready:
            return f"Ready{beside} ({self.seconds:.0f} s)"
        return f"Not ready: {_count(len(self.of('fault')), 'fault')}{beside} ({self.seconds:.0f} s)"

    def as_dict(self) -> dict[str, Any]:
        return {
            "ready": self.ready,
            "verdict": self.verdict(),
            "world": {"size": self.places[0].size, "processes": [place.as_dict() for place in self.places.values()]},
            "configuration": self.configuration,
            "run_dir": self.run_dir,
            "seconds": self.seconds,
            "counts": {verdict: len(self.of(verdict)) for verdict in VERDICTS},
            "findings": [row.as_dict() for row in self.rows],
        }


def _shortened(rows: list[Row]) -> list[Row]:
    brief = [row for row in rows if row.brief and row.verdict == "ok" and not row.who]
    if len(brief) < 2:
        return rows
    value = ", ".join(f"{row.check} {row.value}" for row in brief)
    first = brief[0]
    return [*(row for row in rows if row not in brief), Row(first.group, "others", "ok", value, "", first.ranks)]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
