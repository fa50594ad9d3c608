"""Whether the working tree trains as another commit does, on this machine and to the bit: ``make golden BASE=COMMIT``.

Both run the five runs of this working tree's ``runs.py`` in float64 and in float32, each with its own ``cml_dist``.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float64", "float32")


def difference(a: float, b: float) -> float:
    """Relative; numbers below 1e-3 are compared as if they were 1e-3: what should be 0 is only rounding."""
    return abs(a - b) / max(abs(a), abs(b), 1e-3)


def differences(now: dict[str, float], then: dict[str, float]) -> dict[str, float]:
    """Of each number; infinite where one side lacks it."""
    names = dict.fromkeys([*then, *now])
    return {name: difference(now[name], then[name]) if name in now and name in then else math.inf for name in names}


def git(*words: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: git {' '.join(words)}: {done.stderr.strip()}")


def start(package: Path, out: Path) -> subprocess.Popen:
    """The five runs with the package that lies in a folder, which need not be the one that is installed."""
    command = [sys.executable, str(ROOT / "tests" / "golden" / "runs.py"), "--out", str(out), "--dtype", *DTYPES]
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=environment, cwd=out.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def both(base: Path, folder: Path) -> list[dict[str, Any]]:
    """What the commit and the working tree end with, side by side."""
    packages = {"base": base, "here": ROOT}
    processes = {name: start(package, folder / f"{name}.json") for name, package in packages.items()}
    try:
        for name, process in processes.items():
            told, _ = process.communicate()
            if process.returncode != 0 or f"cml_dist is {packages[name]}/" not in told:
                sys.exit(f"error: the runs with the cml_dist of {packages[name]} failed:\n{told}")
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return [json.loads((folder / f"{name}.json").read_text()) for name in processes]


def verdict(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Empty if two runs are the same to the bit."""
    moved = differences(now["numbers"], then["numbers"])
    number = max(moved, key=moved.get)
    if now["numbers"] != then["numbers"]:
        return f"largest relative difference {moved[number]:.1e}, in {number}"
    return "" if now["digest"] == then["digest"] else "all numbers are equal, but not every bit of the parameters"


def main() -> int:
    base = sys.argv[1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed then too
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "base"
        git("worktree", "add", "--quiet", "--detach", str(tree), base)
        try:
            then, now = both(tree, Path(folder))
        finally:
            git("worktree", "remove", "--force", str(tree))
    cases = [(run, dtype) for run in now[DTYPES[0]] for dtype in DTYPES]
    verdicts = {(run, dtype): verdict(then[dtype][run], now[dtype][run]) for run, dtype in cases}
    print(f"{then['made']['commit']} and the working tree, {now['made']['commit']}:")
    for (run, dtype), said in verdicts.items():
        print(f"  {run:10}{dtype:10}{said or 'equal to the bit'}")
    return int(any(verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
