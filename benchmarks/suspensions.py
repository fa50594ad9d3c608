"""Suspend a run of two ranks again and again, as `scontrol suspend` does: it goes on each time, and nothing is lost.

    python benchmarks/suspensions.py --times 20 --seconds 40 --long 600

All processes, launchers too, get SIGSTOP one after the other, and later SIGCONT. At the end the run is asked to stop,
and its steps are compared to the bit with those of a run that was never suspended.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from cml_dist.telemetry.metrics import read_metrics

SETTINGS = (
    "domain.shots=5", "domain.queries=5", "model.hidden=[64,64]", "method.inner_steps=3", "train.episodes_per_step=3",
    "eval.every=0", "eval.final=false", "checkpoint.every=1000000", "run.precision=fp64", "parallel.threads=1",
)  # fmt: skip
TIMES = ("seconds", "episodes_per_s", "peak_memory_gib")


def start(folder: Path, steps: int) -> subprocess.Popen:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    trains = ("-m", "cml_dist", "train", "sinusoid", f"run.dir={folder}", f"train.steps={steps}", "run.device=cpu")
    return subprocess.Popen([sys.executable, *torchrun, *trains, *SETTINGS], stdout=subprocess.DEVNULL)


def steps_of(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def goes_on(launch: subprocess.Popen, folder: Path) -> bool:
    """Whether it takes further steps within two minutes."""
    before, until_s = len(steps_of(folder)), time.monotonic() + 120
    while time.monotonic() < until_s and launch.poll() is None:
        if len(steps_of(folder)) > before + 2:
            return True
        time.sleep(0.2)
    return False


def suspend(launch: subprocess.Popen, seconds: float) -> None:
    processes = [psutil.Process(launch.pid), *psutil.Process(launch.pid).children(recursive=True)]
    random.shuffle(processes)
    for process in processes:
        process.suspend()
    time.sleep(seconds)
    for process in processes:
        process.resume()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, metavar="N", help="suspensions (default 20)")
    parser.add_argument("--seconds", type=float, default=40.0, metavar="S", help="of each (default 40)")
    parser.add_argument("--long", type=float, default=600.0, metavar="S", help="of one more at the end (default 600)")
    options = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder, undisturbed = Path(scratch) / "suspended", Path(scratch) / "undisturbed"
        launch = start(folder, 10**6)
        assert goes_on(launch, folder), "it did not start"
        survived = 0
        for number, seconds in enumerate([*[options.seconds] * options.times, options.long], 1):
            time.sleep(random.uniform(0, 3))
            suspend(launch, seconds)
            if not goes_on(launch, folder):
                print(f"suspension {number} of {seconds:.0f} s: the run ended, exit code {launch.poll()}", flush=True)
                break
            survived += 1
            print(f"suspension {number} of {seconds:.0f} s: goes on at step {len(steps_of(folder))}", flush=True)
        if launch.poll() is None:
            launch.send_signal(signal.SIGTERM)
            launch.wait(120)
        lines = steps_of(folder)
        start(undisturbed, len(lines)).wait()
        same = lines == steps_of(undisturbed)
        print(f"survived {survived} of {options.times + 1}; {len(lines)} steps, the same to the bit: {same}")
        return 0 if same and survived == options.times + 1 else 1


if __name__ == "__main__":
    sys.exit(main())
