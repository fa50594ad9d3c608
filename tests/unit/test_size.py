"""domain.size: pre-trained weights read images of the size that they were trained at, everywhere by the same pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_sets import delivered, write_folder, write_set
from packaging import version
from PIL import Image
from timm.models import save_for_hf

import cml_dist
from cml_dist.cli import main
from cml_dist.config.load import parse_config
from cml_dist.data.build import build_domain
from cml_dist.data.pixels import to_image
from cml_dist.data.shards import ShardSet
from cml_dist.errors import ConfigError
from cml_dist.run.folder import run_config
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

PACKED, READ = 16, 48


def run_of(folder: Path, backbone: str = "test_vit", **domain) -> str:
    """A run of one step in ``folder`` on weights whose images had 48 px (lanczos)."""
    if not (folder / "weights").exists():
        torch.manual_seed(0)
        fixed = {"img_size": READ} if timm.get_pretrained_cfg(backbone).fixed_input_size else {}
        save_for_hf(timm.create_model(backbone, **fixed), folder / "weights", safe_serialization=True)
        said = json.loads((folder / "weights" / "config.json").read_text())
        said["pretrained_cfg"] |= {"input_size": [3, READ, READ], "interpolation": "lanczos"}
        (folder / "weights" / "config.json").write_text(json.dumps(said))
        write_set(folder / "set", images=4, size=PACKED)
    images = {"name": "images", "root": str(folder / "set"), "ways": 3, "shots": 1, "queries": 2}
    settings = {
        "domain": images | domain,
        "model": {"backbone": backbone, "pretrained": str(folder / "weights")},
        "method": {"name": "maml", "inner_lr": 0.05},
        "train": {"steps": 1, "episodes_per_step": 1},
        "eval": {"every": 0, "val_episodes": 1, "episodes": 4, "untrained": False},
        "parallel": {"threads": 1},
        "run": {"dir": str(folder / "run")},
    }
    assert train(parse_config(settings), Console()).finished
    return str(folder / "run")


def test_episodes_evaluation_on_another_set_and_answers_have_the_weights_size(tmp_path, capsys):
    run = run_of(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "Images are scaled from 16x16 to 48x48 px (lanczos), as the weights' own, and normalised like those" in said
    assert "packed at that size they would be sharper (data pack --image-size 48)" in said
    described = json.loads((tmp_path / "run" / "export" / "model.json").read_text())
    assert described["input_shape"] == [3, READ, READ]
    assert described["preprocessing"]["packed_size"] == [PACKED, PACKED]

    # What the export answers to the packed pictures is what was tested, to the episode.
    config = run_config(run, [])
    with pytest.raises(ConfigError, match="domain.size is what .* was trained with"):
        run_config(run, ["domain.size=set"])
    with pytest.raises(ConfigError, match="domain.statistics is what .* was trained with"):
        run_config(run, ["domain.statistics=set"])
    data = config.model_dump(mode="json")
    packed = parse_config(data | {"domain": data["domain"] | {"size": "set"}})
    domain = build_domain(packed.domain, train_seed=0, eval_seed=config.eval.seed)
    found, learner = delivered(run, domain, config.eval.episodes), cml_dist.load(run)
    assert np.load(tmp_path / "run" / "eval_scores.npz")["meta"].tolist() == pytest.approx(found)

    if version.parse(timm.__version__) >= version.parse("1.0.26"):  # reads folders
        model = timm.create_model(f"local-dir:{run}/export", pretrained=True)
        assert model.pretrained_cfg["input_size"] == (3, READ, READ)
        assert model.pretrained_cfg["interpolation"] == "lanczos"

    # A set that is packed at the weights' size is read as it is; a file of pictures goes the run's own way.
    write_set(tmp_path / "large", images=4, size=READ)
    assert main(["eval", run, "--on", str(tmp_path / "set"), str(tmp_path / "large")]) == 0
    assert main(["eval", run]) == 0
    shards = ShardSet.open(tmp_path / "set")
    files = {f"{c}/{i}.png": shards.read(4 * c + i) for c in range(3) for i in range(4)}
    write_folder(tmp_path / "examples", files)
    out = str(tmp_path / "out.csv")
    examples = str(tmp_path / "examples")
    assert main(["predict", run, "--support", examples, "--images", examples, "--leave-one-out", "--out", out]) == 0
    named = [(name.split("/")[0], shards.decode(4 * int(name[0]) + int(name[2]))) for name in files]
    adapted = learner.adapt([image for _, image in named], [label for label, _ in named])
    expected = adapted.probabilities([image for _, image in named])
    written = np.loadtxt(out, delimiter=",", skiprows=1, usecols=(2,))
    assert written == pytest.approx(expected.max(1), abs=1e-5)


def test_the_pixels_are_pillows_own(tmp_path):
    write_set(tmp_path / "set", images=4, size=PACKED)
    settings = {"name": "images", "root": str(tmp_path / "set"), "ways": 3, "shots": 1, "queries": 2}
    of_set, scaled = (
        build_domain(parse_config({"domain": settings | size}).domain, train_seed=0, eval_seed=0)
        for size in ({}, {"size": 40})
    )
    for split in ("train", "test"):
        small, large = (domain.episode(split, 3).query.inputs for domain in (of_set, scaled))
        expected = [to_image(image.numpy()).resize((40, 40), Image.Resampling.BICUBIC) for image in small]
        assert (large.numpy() == np.stack([np.asarray(image).transpose(2, 0, 1) for image in expected])).all()


@pytest.mark.parametrize(("size", "read"), [("set", PACKED), (24, 24)])
def test_the_size_can_be_the_sets_or_any(size, read, tmp_path):
    run = run_of(tmp_path, "test_resnet", size=size)
    assert json.loads(Path(run, "export", "model.json").read_text())["input_shape"] == [3, read, read]


def test_a_run_that_began_before_the_setting_keeps_the_sets_size(tmp_path):
    run = Path(run_of(tmp_path, size="set"))
    text = (run / "config.yaml").read_text()
    assert "  size: set\n" in text
    (run / "config.yaml").write_text(text.replace("  size: set\n", ""))
    assert run_config(run, []).domain.size == "set"
    run_of(tmp_path)  # nothing else is asked for: it goes on as it began


def test_plan_counts_images_as_they_are_read(tmp_path, capsys):
    run_of(tmp_path)
    capsys.readouterr()
    words = ["plan", "mini_imagenet", f"domain.root={tmp_path / 'set'}", "model.backbone=test_vit", "--json"]
    assert main([*words, "--gpus", "1", "--gpu-memory-gib", "8", f"model.pretrained={tmp_path / 'weights'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["inputs"] == [3, READ, READ] and "scaled from 16x16" in found["input_source"]
