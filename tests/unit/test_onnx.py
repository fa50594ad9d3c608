"""ONNX: files of a run and of adapted classifiers answer as torch does, each picture by itself, or are not written."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from image_sets import write_set

import cml_dist
from cml_dist.cli import main
from cml_dist.config.load import merge, parse_config
from cml_dist.data.build import build_domain
from cml_dist.run.folder import run_config
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console

ort = pytest.importorskip("onnxruntime", reason="the extra cml-dist[onnx] is not installed")

SHORT = ["train.steps=1", "eval.every=0", "eval.val_episodes=2", "eval.episodes=2", "eval.untrained=false"]
KINDS = {
    "prototype": ["model.backbone=conv4", "model.filters=8", "model.head=prototype"],
    "vit": ["model.backbone=test_vit"],
}


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs") / "run"
    assert main(["train", "glyphs", f"run.dir={folder}", "parallel.threads=1", *SHORT]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one meta-step by its kind, made when it is asked for."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    packed = write_set(root / "set", images=3, size=32)
    settings = {
        "domain": {"name": "images", "root": str(packed), "ways": 3, "shots": 1, "queries": 2},
        "model": {"colearner": {"depth": 1, "width": 8}},
        "parallel": {"threads": 1},
    }

    def run(kind):
        if kind not in made:
            made[kind] = root / kind
            train(parse_config(merge(settings, [f"run.dir={made[kind]}", *SHORT, *KINDS[kind]])), Console(quiet=True))
        return made[kind]

    return run


def pictures(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def each_by_itself(session, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of a batch, which are those of each of its pictures alone."""
    together = session.run(None, {"pixels": pixels})
    alone = zip(*(session.run(None, {"pixels": one[None]}) for one in pixels), strict=True)
    for batch, ones in zip(together, alone, strict=True):
        np.testing.assert_allclose(batch, np.concatenate(ones), rtol=1e-4, atol=1e-4)
    return {out.name: values for out, values in zip(session.get_outputs(), together, strict=True)}


def test_a_run_gives_features_and_the_heads_outputs_before_any_adaptation(glyphs, tmp_path):
    assert main(["export", str(glyphs), "--onnx", "--to", str(tmp_path)]) == 0
    session = ort.InferenceSession(tmp_path / "model.onnx")
    said = session.get_modelmeta().custom_metadata_map
    assert said["input"].startswith("pixels: uint8 [N, 1, 28, 28], grey")
    description = json.loads((tmp_path / "model.json").read_text())
    assert json.loads(said["mean"]) == description["preprocessing"]["mean"]
    assert "model.onnx" in (tmp_path / "README.md").read_text()
    pixels = pictures(7, 1, 28, 28)
    found = each_by_itself(session, pixels)
    assert found["features"].shape == (7, 64) and found["outputs"].shape == (7, 5)
    # A learner that takes no step on the first training episode has its statistics.
    episode = build_domain(run_config(glyphs, []).domain, train_seed=0, eval_seed=0).episode("train", 0)
    images = [image for batch in episode.batches for image in batch.inputs.numpy()]
    labels = [label for batch in episode.batches for label in batch.targets.tolist()]
    expected = cml_dist.load(tmp_path).adapt(images, labels, inner_steps=0).probabilities(list(pixels))
    odds = np.exp(found["outputs"])
    np.testing.assert_allclose(odds / odds.sum(1, keepdims=True), expected, rtol=1e-4, atol=1e-4)
    assert main(["export", str(glyphs), "--to", str(tmp_path)]) == 0
    assert not (tmp_path / "model.onnx").exists(), "it would be of another export"


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_classifier_answers_as_it_does_here(kind, runs, tmp_path, capfd):
    adapted = cml_dist.load(runs(kind)).adapt(list(pictures(8, 32, 32, 3)), ["pear", "apple"] * 4)
    adapted.save(tmp_path / "fruit.safetensors")
    assert main(["export", str(tmp_path / "fruit.safetensors"), "--onnx"]) == 0
    assert f"ONNX file: {tmp_path / 'fruit.onnx'}" in "".join(capfd.readouterr()).replace("\n", "")
    session = ort.InferenceSession(tmp_path / "fruit.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["pear", "apple"]
    pixels = pictures(7, 3, 32, 32)
    found = each_by_itself(session, pixels)["probabilities"]
    np.testing.assert_allclose(found, adapted.probabilities(list(pixels)), rtol=1e-4, atol=1e-4)


def test_where_it_differs_nothing_is_written(runs, tmp_path, monkeypatch, capfd):
    cml_dist.load(runs("prototype")).adapt(list(pictures(2, 32, 32, 3)), ["a", "b"]).save(tmp_path / "a.safetensors")
    monkeypatch.setattr("cml_dist.run.onnx_file.TOLERANCE", -1.0)
    assert main(["export", str(tmp_path / "a.safetensors"), "--onnx"]) == 1
    assert "of conv4 ONNX Runtime and torch answer otherwise: logits of 7 inputs" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_cannot_be_is_one_line(runs, tmp_path, monkeypatch, capfd):
    file = tmp_path / "a.safetensors"
    cml_dist.load(runs("prototype")).adapt(list(pictures(2, 32, 32, 3)), ["a", "b"]).save(file)
    for words in ([], ["--onnx", "--license", "mit"]):
        assert main(["export", str(file), *words]) == 2
        assert "is an adapted classifier, which is exported as ONNX alone; give --onnx" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for which in (file, runs("prototype")):
        assert main(["export", str(which), "--onnx"]) == 2
        assert "the package onnxruntime; pip install 'cml-dist[onnx]'" in capfd.readouterr().err
