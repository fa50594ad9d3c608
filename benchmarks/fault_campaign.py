"""Faults on purpose: seeded kills, hangs, storms of signals, full disks and damaged files, each against a run in peace.

    python benchmarks/fault_campaign.py --cases 66 --seed 0 --out faults          # faults.md, faults.json
    python benchmarks/fault_campaign.py --only kill-writer-in-save --cases 5      # one kind
    python benchmarks/fault_campaign.py --case 17 --keep                          # one case again, its files kept

After each fault: every process must be gone within 60 s, the message must name rank and cause, and the same command
must finish the run with the curve, validations, test scores, checkpoint and export of the undisturbed run, to the bit,
after no more work than the steps since the last checkpoint. A run is 60 meta-steps of a small network, with a
checkpoint every 5 and a validation every 20, on processes of this machine (gloo). Some kinds mount file systems and
need root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from fault_cases import KINDS
from fault_lab import References, Result, may_mount, play

from cml_dist.run.record import versions


def draw(num: int, seed: int, only: str | None) -> list[tuple[str, str, str]]:
    """(kind, setup, seed) of each case: each kind once, then by their weights; setups of a kind in turn."""
    rng = random.Random(seed)
    kinds = [only] if only else list(KINDS)
    weighted = [name for name in kinds for _ in range(KINDS[name].weight)]
    drawn: list[tuple[str, str, str]] = []
    turns: dict[str, int] = defaultdict(int)
    while len(drawn) < num:
        names, kinds = rng.sample(kinds, len(kinds)), weighted
        for name in names:
            setups = KINDS[name].setups
            drawn.append((name, setups[turns[name] % len(setups)], f"{seed}/{len(drawn)}"))
            turns[name] += 1
    return drawn[:num]


def row(number: int, result: Result) -> str:
    """A line of progress."""
    exits = ", ".join(f"{x:.1f}" for x in result.exit_s) or "-"
    verdict = "ok" if not result.violation else f"VIOLATION: {result.violation.splitlines()[0][:300]}"
    return (
        f"{number:3} {result.kind:28} {result.setup:8} exit {exits:12} s, lost {sum(result.lost):2}, "
        f"{result.starts} starts, {result.seconds:5.1f} s  {verdict}  [{result.did}]"
    )


def table(results: list[Result]) -> str:
    """Kinds x cases x outcomes, as markdown."""
    lines = [
        "| kind | cases | held | exit, median s | exit, max s | steps lost, max | worlds |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(r.kind for r in sorted(results, key=lambda r: list(KINDS).index(r.kind))):
        mine = [r for r in results if r.kind == kind]
        exits = [x for r in mine for x in r.exit_s]
        times = (f"{statistics.median(exits):.1f}", f"{max(exits):.1f}") if exits else ("-", "-")
        lost = max((x for r in mine for x in r.lost), default=0)
        worlds = ", ".join(dict.fromkeys(r.setup for r in mine))
        held = sum(not r.violation for r in mine)
        lines.append(f"| {kind} | {len(mine)} | {held} | {times[0]} | {times[1]} | {lost} | {worlds} |")
    exits = [x for r in results for x in r.exit_s]
    held = sum(not r.violation for r in results)
    lines.append(
        f"| all | {len(results)} | {held} | {statistics.median(exits):.1f} | {max(exits):.1f} | "
        f"{max((x for r in results for x in r.lost), default=0)} | |"
        if exits
        else f"| all | {len(results)} | {held} | - | - | | |"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=66)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS), help="one kind alone")
    parser.add_argument("--case", type=int, nargs="+", help="these cases of the campaign alone, by number")
    parser.add_argument("--keep", action="store_true", help="keep the files also where all held")
    parser.add_argument("--work", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--out", metavar="NAME", help="write NAME.md and NAME.json; cases that held are not repeated")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="faults-"))
    drawn = list(enumerate(draw(args.cases, args.seed, args.only)))
    if args.case is not None:
        drawn = [drawn[number] for number in args.case]
    work.mkdir(parents=True, exist_ok=True)
    references, results, skipped = References(work / "references"), [], []
    earlier = json.loads(Path(f"{args.out}.json").read_text()) if args.out and Path(f"{args.out}.json").exists() else {}
    held = {(r["kind"], r["setup"], r["seed"]): Result(**r) for r in earlier.get("results", ()) if not r["violation"]}
    began = time.monotonic() - earlier.get("seconds", 0)
    for number, (kind, setup, seed) in drawn:
        if (kind, setup, seed) in held:
            results.append(held[kind, setup, seed])
            continue
        if KINDS[kind].needs_mount and not may_mount():
            skipped.append(kind)
            print(f"{number:3} {kind:28} skipped: may not mount a file system here", flush=True)
            continue
        folder = Path(tempfile.mkdtemp(prefix=f"case-{number}-", dir=work))
        results.append(play(kind, KINDS[kind].play, setup, seed, folder, references, keep=args.keep))
        print(row(number, results[-1]), flush=True)
        if args.out:
            record = {
                "seed": args.seed,
                "versions": versions(),
                "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
                "seconds": round(time.monotonic() - began),
                "skipped": skipped,
                "results": [asdict(r) for r in results],
            }
            Path(f"{args.out}.json").write_text(json.dumps(record, indent=1) + "\n")
            Path(f"{args.out}.md").write_text(table(results) + "\n")
    print(f"\n{table(results)}\n\n{time.monotonic() - began:.0f} s")
    violations = [r for r in results if r.violation]
    for result in violations:
        print(f"\n{result.kind} on {result.setup}, seed {result.seed} [{result.did}]: {result.violation}")
    if violations or args.keep or args.work:
        print(f"\nFiles: {work}")
    else:
        shutil.rmtree(work)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
