"""Five short runs and the numbers that they end with: what a change of the code must not move.

    python tests/golden/runs.py --out FILE.json                   # what golden.json holds
    python tests/golden/runs.py --out FILE.json --dtype float32   # all five in it

Whatever ``cml_dist`` comes first on the path is what runs; the output names it.

Every setting that matters stands here, so that another default changes nothing. Weights of timm models come from a file
that is made here, for PyTorch's normal and truncated normal initial values differ between CPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cml_dist
from cml_dist.cli import main as command
from cml_dist.config.load import parse_config
from cml_dist.config.schema import SinusoidConfig
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

DTYPES = ("float64", "float32")
SETS = {"grey": (28, 1), "colour": (32, 3)}
"""Made-up image sets: size and channels."""
CLASSES = {"train": 8, "val": 5, "test": 5}
IMAGES = 6
BACKBONES = {"test_vit": {"img_size": 32}, "test_resnet": {}}
"""timm models that start from made-up weights, and how they are built to find out the shapes."""
SMOOTH = "vit"
"""The run without a kink, which is also run on two processes: where no ReLU switches, rounding stays rounding."""
LOSSES = ("loss", "outer_loss", "colearner_loss", "grad_norm")
"""Of each meta-step. Scores are in the validations and tests."""

IMAGE = {"ways": 5, "shots": 1, "queries": 3, "mean": [0.5], "std": [0.25], "memory_gib": 1.0, "workers": 0}
NO_CHANGES = {"flip": False, "crop_padding": 0, "rotate_classes": False}
COLOUR = IMAGE | {"name": "images", "root": "{work}/colour", "mean": [0.5, 0.4, 0.6], "std": [0.25, 0.3, 0.2],
                  "size": "set"}
METHOD = {"name": "cml", "inner_steps": 1, "head_lr": None, "body_lr": None, "adapts": None, "gamma": 1.0, "order": 2}
# eps is far above what rounding leaves of a gradient that is truly 0 (a bias before BatchNorm), which Adam divides by.
ADAM = {
    "name": "adam", "lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-3, "weight_decay": 0.0, "schedule": "constant",
    "warmup_steps": 0, "clip_norm": None,
}  # fmt: skip
EVAL = {
    "every": 2, "val_episodes": 3, "episodes": 4, "split": "test", "learner": "meta", "co_adapt": "eq9",
    "inner_steps": None, "seed": 0, "untrained": False, "final": True,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "glyphs": {
        "domain": IMAGE | {"name": "glyphs", "root": None, "augment": NO_CHANGES},
        "model": {"backbone": "conv4", "filters": 8, "norm": "batch", "trained": ["body", "head"],
                  "colearner": {"depth": 2}},
        "method": METHOD | {"inner_lr": 0.1},
        "engine": {"name": "graph", "micro_batch": None},
        "optim": ADAM | {"schedule": "cosine", "warmup_steps": 2, "final_lr_factor": 0.1},
        "train": {"steps": 4, "episodes_per_step": 3},
        "eval": EVAL,
    },
    "omniglot": {
        "domain": IMAGE | {"name": "omniglot", "root": "{work}/grey", "augment": NO_CHANGES | {"rotate_classes": True}},
        "model": {"backbone": "conv4", "filters": 8, "norm": "batch", "trained": ["body", "head"],
                  "colearner": {"depth": 1}},
        "method": METHOD | {"inner_steps": 2, "inner_lr": 0.5, "adapts": ["head", "last:2"], "gamma": 0.5, "order": 1},
        "engine": {"name": "graph", "micro_batch": None},
        "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "schedule": "step",
                  "warmup_steps": 0, "step_every": 2, "step_factor": 0.5, "clip_norm": 0.5},
        "train": {"steps": 4, "episodes_per_step": 2},
        "eval": EVAL | {"learner": "co", "co_adapt": "released"},
    },
    "sinusoid": {
        "domain": {"name": "sinusoid", "shots": 5, "queries": 7, "noise": 0.1, "workers": 0},
        "model": {"backbone": "mlp", "norm": "batch", "trained": ["body", "head"], "colearner": {"depth": 1}},
        "method": METHOD | {"inner_steps": 3, "inner_lr": 0.01, "head_lr": 0.02, "body_lr": 0.005, "gamma": 0.2},
        "engine": {"name": "adjoint", "micro_batch": None},
        "optim": ADAM | {"name": "adamw", "lr": 0.003, "weight_decay": 0.1, "schedule": "linear",
                         "final_lr_factor": 0.5},
        "train": {"steps": 6, "episodes_per_step": 4},
        "eval": EVAL | {"every": 3, "val_episodes": 5, "episodes": 6, "inner_steps": 5},
    },
    "vit": {
        "domain": COLOUR | {"augment": NO_CHANGES | {"flip": True, "crop_padding": 2}},
        "model": {"backbone": "test_vit", "pretrained": "{work}/test_vit.safetensors", "norm": "batch",
                  "trained": ["body", "head"], "colearner": {"depth": 1, "width": 16}},
        "method": METHOD | {"inner_steps": 2, "inner_lr": 0.1, "gamma": 0.7},
        "engine": {"name": "adjoint", "micro_batch": 4},
        "optim": ADAM | {"name": "adamw", "lr": 0.001, "weight_decay": 0.05, "clip_norm": 1.0},
        "train": {"steps": 3, "episodes_per_step": 3},
        "eval": EVAL | {"every": 0},
    },
    "resnet": {
        "domain": COLOUR | {"augment": NO_CHANGES},
        "model": {"backbone": "test_resnet", "pretrained": "{work}/test_resnet.safetensors", "norm": "frozen",
                  "trained": ["head", "last:2"], "colearner": {"depth": 1, "width": 8}},
        "method": METHOD | {"inner_steps": 3, "inner_lr": 0.01},
        "engine": {"name": "adjoint", "micro_batch": None},
        "optim": ADAM | {"lr": 0.002},
        "train": {"steps": 3, "episodes_per_step": 2},
        "eval": EVAL | {"every": 0},
    },
}  # fmt: skip


def prepare(work: Path) -> None:
    """Image sets and weight files, the same bytes on each machine: from a seed, by numpy's generator alone."""
    for seed, (name, (size, channels)) in enumerate(SETS.items()):
        rng = np.random.default_rng(seed)
        for split, classes in CLASSES.items():
            for number in range(classes):
                folder = work / "images" / name / split / f"{split}-{number}"
                folder.mkdir(parents=True)
                pattern = rng.integers(0, 256, (size, size, channels), np.uint8)
                for image in range(IMAGES):
                    noise = rng.integers(0, 256, pattern.shape, np.uint8)
                    pixels = np.where(rng.random((size, size, 1)) < 0.4, noise, pattern)
                    Image.fromarray(pixels.squeeze()).save(folder / f"{image}.png")
        assert command(["data", "pack", str(work / "images" / name), str(work / name)]) == 0
    for seed, (name, settings) in enumerate(BACKBONES.items()):
        rng = np.random.default_rng(seed)
        state = timm.create_model(name, **settings).state_dict()
        save_file({key: made_up(key, value, rng) for key, value in state.items()}, work / f"{name}.safetensors")


def made_up(name: str, like: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Values of a trained network's size, statistics too."""
    if not like.is_floating_point():
        return torch.ones_like(like)
    uniform = torch.from_numpy(rng.uniform(-1, 1, like.shape).astype(np.float32))
    if like.dim() > 1:
        return uniform * (3 / like[0].numel()) ** 0.5
    return 0.2 * uniform + (0.0 if name.endswith(("bias", "mean")) else 0.7 if name.endswith("var") else 1.0)


def settings(name: str, dtype: str, work: Path, strategy: str = "single") -> dict[str, Any]:
    """The configuration of a run, in a folder that :func:`prepare` has filled."""
    config = json.loads(json.dumps(RUNS[name]).replace("{work}", str(work)))
    if "draw" in SinusoidConfig.model_fields:  # or it is an earlier version, which draws so
        config["domain"]["draw"] = 1
    run = {"seed": 3, "device": "cpu", "dtype": dtype, "compute": "dtype", "deterministic": True}
    return config | {
        "checkpoint": {"every": 100, "every_minutes": None, "keep_last": 1},
        "parallel": {"strategy": strategy, "threads": 1},
        "run": run | {"dir": str(work / f"{name}-{dtype}-{strategy}")},
    }


def run(name: str, dtype: str, work: Path) -> dict[str, Any]:
    """Train in this process; what it ended with."""
    config = settings(name, dtype, work)
    assert train(parse_config(config), Console(quiet=True)).finished
    return outcome(Path(config["run"]["dir"]))


def outcome(folder: Path) -> dict[str, Any]:
    """Every number by its name, and a digest of all parameters."""
    numbers: dict[str, float] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        # A step that was skipped since it was not finite has no values.
        numbers |= {f"step {line['step']}: {key}": np.nan if line[key] is None else line[key] for key in LOSSES}
    for line in map(json.loads, (folder / "validation.jsonl").read_text().splitlines()):
        numbers[f"step {line['step']}: validation"] = line["mean"]
    tested = json.loads((folder / "eval.json").read_text())
    numbers |= {f"test: {learner}": tested[learner]["mean"] for learner in ("meta", "co")}
    digest = hashlib.sha256()
    for name, value in sorted(load_file(max((folder / "checkpoints").glob("step-*.safetensors"))).items()):
        if name.startswith("param/"):
            numbers[f"norm: {name.removeprefix('param/')}"] = value.double().norm().item()
            digest.update(name.encode() + value.numpy().tobytes())
    return {"numbers": numbers, "digest": digest.hexdigest()}


def made_with() -> dict[str, str]:
    """What numbers depend on besides the code."""
    packages = ("torch", "timm", "numpy", "pillow", "matplotlib", "accelerate", "deepspeed")
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = models[0].partition(": ")[2] if models else platform.machine()
    return {"cpu": cpu, "python": platform.python_version(), **{name: version(name) for name in packages}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help=f"default: float64, and {SMOOTH} alone in float32")
    args = parser.parse_args()
    print(f"cml_dist is {cml_dist.__file__}", flush=True)
    described = ["git", "-C", str(Path(cml_dist.__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()
    found: dict[str, Any] = {"made": {"by": " ".join(["python", *sys.argv]), "commit": commit, **made_with()}}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for dtype in args.dtype or DTYPES:
            names = RUNS if args.dtype or dtype == "float64" else [SMOOTH]
            found[dtype] = {name: run(name, dtype, Path(folder)) for name in names}
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
