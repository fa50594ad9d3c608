"""What a meta-step takes besides its gradient: the wait for data, the optimizer, and all the rest of the loop.

    python benchmarks/around_step.py                          # every case; --only sinusoid: those with this in the name
    python benchmarks/around_step.py --only streamed --threads 1

Each case is a run of the trainer in a fresh process, with its parts timed; the first steps are left out, of the others
the median counts, and of the wait the least tenth too, which other work on the machine disturbs least. Waits are by the
clock, the rest of the loop in CPU time of its thread. The simulated GPU is a sleep for each of four episodes, in which
the CPU is free. Images are 84 px JPEGs, made up: smooth colours with some grain, 3 KB each, as those of miniImageNet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

WARM_UP = 5
IMAGES = (
    "domain.name=images", "domain.root=SET", "domain.shots=5", "train.episodes_per_step=4", "method.name=maml",
    "engine.name=graph", "domain.augment.rotate_classes=false",
)  # fmt: skip
STREAMED = (*IMAGES, "domain.memory_gib=0")
CASES = {
    # name: recipe, settings, meta-steps, seconds of a step of the simulated GPU (0: the real step)
    "sinusoid": ("sinusoid", (), 500, 0),
    "glyphs": ("glyphs", (), 60, 0),
    "glyphs, in memory, GPU of 20 ms": ("glyphs", ("domain.shots=5",), 150, 0.02),
    "84 px, in memory, CPU": ("glyphs", IMAGES, 12, 0),
    "84 px, streamed, CPU": ("glyphs", STREAMED, 12, 0),
    "84 px, in memory, GPU of 20 ms": ("glyphs", IMAGES, 150, 0.02),
    "84 px, streamed, 0 workers, GPU of 20 ms": ("glyphs", (*STREAMED, "domain.workers=0"), 60, 0.02),
    "84 px, streamed, 1 worker, GPU of 20 ms": ("glyphs", (*STREAMED, "domain.workers=1"), 100, 0.02),
    "84 px, streamed, 2 workers, GPU of 20 ms": ("glyphs", (*STREAMED, "domain.workers=2"), 150, 0.02),
    # As 4 and 8 workers, on cores of their own, beside one of 20 ms.
    "84 px, streamed, 2 workers, GPU of 40 ms": ("glyphs", (*STREAMED, "domain.workers=2"), 100, 0.04),
    "84 px, streamed, 2 workers, GPU of 80 ms": ("glyphs", (*STREAMED, "domain.workers=2"), 60, 0.08),
}
PARTS = ("data", "prepare", "meta_gradient", "gradient", "apply", "reduce", "tell", "record", "show", "whole")
COLUMNS = (
    "ms a step", "step", "wait for data", "least tenth", "share of all", "prepare", "step, CPU", "rest, CPU", "share",
    "of it the loop", "reduce", "metrics line", "screen", "(optimizer)",
)  # fmt: skip


class Enough(Exception):
    """All steps are measured."""


class Clock:
    """Milliseconds by part of each meta-step: by the clock, and of this thread's CPU."""

    def __init__(self) -> None:
        self.now = defaultdict(lambda: [0.0, 0.0])
        self.steps: list[dict[str, list[float]]] = []
        self._began = self._read()

    def timed(self, part: str, work):
        def measured(*args, **named):
            began = self._read()
            try:
                return work(*args, **named)
            finally:
                self._add(part, began)

        return measured

    def step(self, most: int) -> None:
        """A meta-step is done, and maybe the last of ``most``."""
        self._add("whole", self._began)
        self.steps.append(dict(self.now))
        self.now.clear()
        if len(self.steps) == most:
            raise Enough
        self._began = self._read()

    def _add(self, part: str, began: tuple[float, float]) -> None:
        spent = self.now[part]
        for kind, now in enumerate(self._read()):
            spent[kind] += now - began[kind]

    @staticmethod
    def _read() -> tuple[float, float]:
        return 1000 * time.perf_counter(), 1000 * time.thread_time()


def measure(
    recipe: str, settings: list[str], steps: int, gpu_s: float, threads: int, ahead: int, root: str
) -> list[dict]:
    """In a fresh process: the seconds of each step by part."""
    import torch

    from cml_dist.config.load import load_config
    from cml_dist.distributed.strategy import Carrier, DataParallel
    from cml_dist.distributed.world import World
    from cml_dist.meta import model as meta
    from cml_dist.meta.gradient import MetaGradient
    from cml_dist.run import trainer
    from cml_dist.run.session import Session
    from cml_dist.telemetry.console import Console
    from cml_dist.telemetry.live import TrainingView

    clock, stream = Clock(), trainer.episode_stream

    def timed_stream(domain, split, indices, **how):
        # On a GPU it takes no time of the CPU.
        domain.prepare = (lambda episode, *_: episode) if gpu_s else clock.timed("prepare", domain.prepare)
        episodes = stream(domain, split, indices, ahead=ahead if gpu_s else None, **how)
        take = clock.timed("data", lambda: next(episodes))
        while True:
            yield take()

    def on_gpu(params, episode, *_, **__):
        time.sleep(gpu_s / 4)
        terms = {name: torch.zeros(()) for name in ("loss", "outer_loss", "score")}
        return MetaGradient({name: torch.zeros_like(value) for name, value in params.items()}, terms)

    trainer.episode_stream = timed_stream
    meta.meta_gradient = clock.timed("meta_gradient", on_gpu if gpu_s else meta.meta_gradient)
    for owner, name, part in (
        (Carrier, "gradient", "gradient"),
        (DataParallel, "apply", "apply"),
        (World, "start_sum", "reduce"),
        (trainer.Trainer, "to_tell", "tell"),
        (Session, "record_step", "record"),
        (TrainingView, "step", "show"),
    ):
        setattr(owner, name, clock.timed(part, getattr(owner, name)))

    with tempfile.TemporaryDirectory() as folder:
        fixed = ("train.steps=1000000", "eval.every=0", "checkpoint.every=1000000", "eval.final=false",
                 "run.device=cpu", f"parallel.threads={threads}", f"run.dir={folder}/run")  # fmt: skip
        config = load_config(recipe, (*(word.replace("SET", root) for word in settings), *fixed))
        with suppress(Enough):
            console = Console(open(os.devnull, "w"))
            trainer.train(config, console, on_step=lambda _, what: clock.step(steps) if what == "step" else None)
    return clock.steps[WARM_UP:]


def make_images(root: Path, classes: int = 64, images: int = 100) -> None:
    """A packed set of 84 px JPEGs."""
    import io

    from PIL import Image

    from cml_dist.data.pixels import Picture, to_array
    from cml_dist.data.shard_writer import new_shard_set

    rng = np.random.default_rng(0)
    with new_shard_set(root, name="made", image_size=(84, 84), channels=3, source="made") as writer:
        for split, count in (("train", classes), ("val", 5), ("test", 5)):
            for number in range(count * images):
                coarse = Image.fromarray(rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)).resize((84, 84), 3)
                grain = rng.normal(0, 6, (84, 84, 3))
                image = Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=85)
                data, name = buffer.getvalue(), f"{split}-{number // images}"
                pixels = to_array(Image.open(io.BytesIO(data)))
                writer.add(split, name, f"{name}/{number}", Picture(data, "jpg", pixels))


def decoding(root: Path) -> str:
    """What one image costs one core."""
    from cml_dist.data.shards import ShardSet

    shards, times = ShardSet.open(root), []
    for number in range(1000):
        began_s = time.process_time()
        shards.decode(number)
        times.append(time.process_time() - began_s)
    size = np.mean([len(shards.read(number)) for number in range(1000)])
    return f"an image has {size / 1000:.1f} KB and takes {1000 * np.median(times):.3f} ms of CPU to decode"


def show(name: str, steps: list[dict]) -> None:
    """A line of the table."""
    wall, cpu = ({part: np.array([s.get(part, (0, 0))[kind] for s in steps]) for part in PARTS} for kind in (0, 1))
    wait = wall["data"] - wall["prepare"]  # the gradient asks for the episodes itself
    rest = cpu["whole"] - cpu["meta_gradient"] - cpu["apply"] - cpu["data"]
    loop = cpu["whole"] - cpu["gradient"] - cpu["apply"] + cpu["tell"] + cpu["reduce"]  # which the gradient calls
    share = f"{wait.sum() / wall['whole'].sum():.2%}"
    own = f"{rest.sum() / cpu['whole'].sum():.2%}"
    parts = (loop, cpu["tell"] + cpu["reduce"], cpu["record"], cpu["show"], cpu["apply"])
    medians = [f"{np.median(ms):.3f}" for ms in parts]
    waited = (f"{np.median(wait):.2f}", f"{np.quantile(wait, 0.1):.2f}", share, f"{np.median(wall['prepare']):.2f}")
    left = (f"{np.median(cpu['whole']):.1f}", f"{np.median(rest):.3f}", own)
    cells = (name, f"{np.median(wall['whole']):.1f}", *waited, *left, *medians)
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ahead", type=int, default=4, help="beside the simulated GPU; 4 beside a real one")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--in-here", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.in_here:
        print(json.dumps(measure(*json.loads(asked.in_here))))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        if any("84 px" in name and asked.only in name for name in CASES):
            make_images(root)
            print(decoding(root))
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        for name, (recipe, settings, steps, gpu_s) in CASES.items():
            if asked.only in name:
                words = json.dumps([recipe, settings, steps, gpu_s, asked.threads, asked.ahead, str(root)])
                command = [sys.executable, "-W", "ignore", __file__, "--in-here", words]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                show(name, json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
