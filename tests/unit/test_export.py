"""Export and use: what is written, that phi is gone, and that a loaded learner computes what was tested."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from image_sets import write_set
from packaging.version import Version
from PIL import Image
from safetensors.torch import save_file

import cml_dist
from cml_dist.cli import main
from cml_dist.config.load import merge, parse_config
from cml_dist.data.build import build_domain
from cml_dist.errors import CheckpointError, DataError
from cml_dist.run.described import described_net
from cml_dist.run.export import Wanted, export_again, read_weights
from cml_dist.run.folder import run_config
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

WAYS, SHOTS, QUERIES = 3, 1, 2
SETTINGS = {
    "method": {"inner_lr": 0.1, "inner_steps": 2},
    "train": {"steps": 2, "episodes_per_step": 1},
    "eval": {"every": 0, "val_episodes": 2, "episodes": 4, "untrained": False, "norm": "support"},
    "parallel": {"threads": 1},
}
MODELS = {
    "conv4": {"backbone": "conv4", "filters": 8},
    "vit": {"backbone": "test_vit", "colearner": {"depth": 1, "width": 8}},
    "resnet": {"backbone": "test_resnet", "colearner": {"depth": 1, "width": 8}},
    "meta_sgd": {"backbone": "conv4", "filters": 8, "head": "ridge"},
    "maml_pp": {"backbone": "test_resnet", "colearner": {"depth": 1, "width": 8}},
    "lora": {"backbone": "test_vit", "colearner": {"depth": 1, "width": 8}},
    "warpgrad": {"backbone": "conv4", "filters": 8},
    "headless": {"backbone": "test_efficientnet", "head": "ridge", "colearner": {"depth": 1, "width": 8}},
}
METHODS = {
    "meta_sgd": ["method.name=meta_sgd", "method.colearner=true"],
    "maml_pp": ["method.name=maml_pp", "method.colearner=true", "method.multi_step_loss=9", "eval.inner_steps=3"],
    "lora": ["method.adapts=[head,lora:2]"],
    "warpgrad": ["method.name=warpgrad", "method.colearner=true"],
}
"""``maml_pp`` is tested with a step more than it has rows for."""


@pytest.fixture(scope="module")
def image_set(tmp_path_factory):
    # At 32 px the last batch statistics of the ResNet are of 3 numbers: rounding alone would move an answer.
    return write_set(tmp_path_factory.mktemp("set") / "packed", images=4, size=64)


@pytest.fixture(scope="module", params=MODELS)
def run(request, image_set, tmp_path_factory):
    """A short run of each kind of backbone: its folder and configuration."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    domain = {"name": "images", "root": str(image_set), "ways": WAYS, "shots": SHOTS, "queries": QUERIES}
    more = METHODS.get(request.param, [])
    settings = {**SETTINGS, "domain": domain, "model": MODELS[request.param]}
    config = parse_config(merge(settings, [f"run.dir={folder}", *more]))
    train(config, Console(quiet=True))
    return folder, config


def in_timm(folder):
    """What plain timm makes of the export of a run."""
    if Version(timm.__version__) < Version("1.0.26"):
        pytest.skip("timm reads safetensors in a local folder since 1.0.26")
    return timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()


def test_the_colearner_is_gone_and_the_rest_is_there(run):
    folder, config = run
    tensors = read_weights(folder / "export")
    learned = {"rule"} if folder.name in {*METHODS} - {"warpgrad"} else set()
    assert {name.partition(".")[0] for name in tensors} == {"body", "head", *learned}
    card = (folder / "export" / "README.md").read_text()
    assert f"{WAYS}-way {SHOTS}-shot" in card and "on small" in card
    rates = [value for name, value in tensors.items() if name.startswith("rule.lr.")]
    said = f"step size learned: {min(v.min() for v in rates):.3g} to" if rates else "step size body 0.1, head 0.1;"
    assert said in card
    assert ("BatchNorm uses the statistics" in card) is (config.model.backbone != "test_vit")
    assert f"| 6 classes: {', '.join(f'train-{number}' for number in range(6))} |" in card
    assert "| chance | 33.33 % |" in card
    description = json.loads((folder / "export" / "model.json").read_text())
    report = json.loads((folder / "eval.json").read_text())
    assert description["eval"]["meta"] == report["meta"]


def test_all_files_of_a_run_follow_the_umask(run):
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in run[0].rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys(files, 0o666 & ~mask)


def test_a_loaded_learner_scores_what_the_test_scored(run):
    """The same episodes as eval.json, but from pixels through the public API alone, and each image by itself."""
    folder, config = run
    domain = build_domain(config.domain, train_seed=0, eval_seed=config.eval.seed)
    learner = cml_dist.load(folder)
    scores = []
    for index in range(config.eval.episodes):
        episode = domain.episode("test", index)
        names = [f"class {label}" for label in episode.support.targets.tolist()]
        adapted = learner.adapt(list(episode.support.inputs.numpy()), names)
        images = list(episode.query.inputs.numpy())
        predicted = adapted.predict(images)
        assert predicted == [adapted.predict([image])[0] for image in images]
        truth = [f"class {label}" for label in episode.query.targets.tolist()]
        scores.append(np.mean([p == t for p, t in zip(predicted, truth, strict=True)]))
    saved = np.load(folder / "eval_scores.npz")["meta"]
    assert np.allclose(scores, saved)


def test_plain_timm_reads_the_folder(run):
    folder, config = run
    card = (folder / "export" / "README.md").read_text()
    if config.model.backbone == "conv4":
        assert "Plain timm does not know conv4" in card
        return
    model = in_timm(folder)
    ours, state = read_weights(folder / "export"), model.state_dict()
    merged = {n.removeprefix("rule.lora.").removesuffix(".A") for n in ours if n.startswith("rule.lora.")}
    for name, value in ours.items():
        if name.startswith("body.model.") and name not in merged:
            assert torch.equal(state[name.removeprefix("body.model.")], value), name
    if config.model.head == "linear":
        assert torch.equal(model.get_classifier().weight, ours["head.weight"])
    else:
        assert model.num_classes == 0
    rows = {n.removeprefix("rule.norm.body.model."): rows for n, rows in ours.items() if n.startswith("rule.norm.")}
    assert all(len(of) == 2 and torch.equal(state[name], of[0]) for name, of in rows.items())
    assert bool(rows) == ("those of the first step alone" in card) == (config.method.name == "maml_pp")
    assert bool(rows) == any(not torch.equal(of[0], of[1]) for of in rows.values())
    settings = json.loads((folder / "export" / "config.json").read_text())["pretrained_cfg"]
    assert settings["mean"] == json.loads((folder / "export" / "model.json").read_text())["preprocessing"]["mean"]


def test_plain_timm_computes_what_the_learner_does_before_it_adapts(run):
    """Images of the first training episode, by whose statistics it answers: the head's outputs."""
    folder, config = run
    if config.model.backbone == "conv4" or config.model.head != "linear":
        return
    episode = build_domain(config.domain, train_seed=0, eval_seed=0).episode("train", 0)
    images = torch.cat([batch.inputs for batch in episode.batches])
    learner = cml_dist.load(folder)
    labels = [str(label) for batch in episode.batches for label in batch.targets.tolist()]
    ours = learner.adapt(list(images.numpy()), labels, inner_steps=0).probabilities(list(images.numpy()))
    model = in_timm(folder)
    with torch.no_grad():
        theirs = torch.cat([model(learner.inputs([image])) for image in images.numpy()]).softmax(1)
    assert np.allclose(ours, theirs.numpy(), atol=1e-4)


def test_the_code_on_the_card_runs_as_it_stands(run, monkeypatch, capsys):
    folder, config = run
    monkeypatch.chdir(folder / "export")
    code, *more = re.findall(r"^```python\n(.*?)^```", (folder / "export" / "README.md").read_text(), re.M | re.S)
    assert len(code.splitlines()) == 6 and len(more) == (config.model.backbone != "conv4")
    exec(code, {})
    assert re.fullmatch(r"\['(apple|pear)'(, '(apple|pear)'){2}\]\n", capsys.readouterr().out)
    if more and in_timm(folder):
        exec(*more, {})


def test_a_card_as_a_hub_reads_it(run, tmp_path):
    folder, _ = run
    assert main(["export", str(folder), "--to", str(tmp_path), "--license", "cc-by-4.0"]) == 0
    for path, license in ((folder / "export", "unknown"), (tmp_path, "cc-by-4.0")):
        _, front, card = (path / "README.md").read_text().split("---\n", 2)
        said = yaml.safe_load(front)
        assert (said["license"], said["pipeline_tag"]) == (license, "image-classification")
        assert f"| licence | {'not stated' if license == 'unknown' else 'cc-by-4.0'} |" in card
        best = json.loads((folder / "validation.jsonl").read_text().splitlines()[-1])
        assert f"\n| 2 | {100 * best['mean']:.2f} % ± " in card


@pytest.mark.parametrize("run", ["vit"], indirect=True)
def test_an_export_of_the_format_before_is_read(run, tmp_path):
    """Format 2: one file under the package's own names."""
    folder, _ = run
    description = json.loads((folder / "export" / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**description, "format": 2}))
    names = {n for n, _ in described_net(description, {}).named_parameters()}
    kept = {n: t for n, t in read_weights(folder / "export").items() if n in names}
    save_file(kept, tmp_path / "model.safetensors")
    image = np.zeros((64, 64, 3), np.uint8)
    now, before = (cml_dist.load(path).adapt([image] * 2, "ab").probabilities([image]) for path in (folder, tmp_path))
    assert np.array_equal(now, before)


def test_export_elsewhere_and_of_another_step(run, tmp_path):
    folder, config = run
    export_again(run_config(str(folder), []), Wanted("last", str(tmp_path / "out")), Console(quiet=True))
    assert cml_dist.load(tmp_path / "out").ways == (None if config.model.head == "ridge" else WAYS)
    with pytest.raises(CheckpointError, match="keeps no checkpoint '77'"):
        export_again(run_config(str(folder), []), Wanted("77"), Console(quiet=True))


@pytest.mark.parametrize("run", ["conv4"], indirect=True)
def test_a_card_without_a_finite_validation_has_no_curve(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "validation.jsonl").unlink()
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    assert "Learning curve" not in (tmp_path / "out" / "README.md").read_text()


def test_images_of_every_kind_are_read_alike(run, tmp_path):
    folder, _ = run
    learner = cml_dist.load(folder)
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    kinds = [array, array.transpose(2, 0, 1), Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png")]
    read = learner.inputs(kinds)
    assert all(torch.equal(read[0], one) for one in read)
    assert learner.inputs([Image.fromarray(array).resize((50, 40))]).shape == (1, 3, 64, 64)


def test_bad_input_is_named(run, tmp_path):
    folder, _ = run
    learner = cml_dist.load(folder)
    image = np.zeros((64, 64, 3), np.uint8)
    assert learner.adapt([image] * 4, "abcd").predict([image])[0] in "abcd"  # also more than the head has outputs
    if learner.ways is None:
        return
    with pytest.raises(DataError, match="2 examples came with 1 labels"):
        learner.adapt([image] * 2, [1])
    with pytest.raises(DataError, match="float64"):
        learner.inputs([image.astype(float)])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="broken.png cannot be decoded"):
        learner.inputs([tmp_path / "broken.png"])
    with pytest.raises(CheckpointError, match="no exported model"):
        cml_dist.load(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere holds no exported model .*; give a run folder"):
        cml_dist.load(tmp_path / "nowhere")
    shutil.copytree(folder / "export", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="damaged"):
        cml_dist.load(tmp_path / "cut")


def test_adapting_leaves_the_learner_as_it_is(run):
    learner = cml_dist.load(run[0])
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(4)]
    before = learner.adapt(images[:2], ["a", "b"]).probabilities(images)
    learner.adapt(images[2:], ["x", "y"])
    after = learner.adapt(images[:2], ["a", "b"]).probabilities(images)
    assert np.array_equal(before, after)
    assert before.shape == (4, 2) and np.allclose(before.sum(1), 1, atol=1e-6)
