"""With pre-trained weights a run tells what the nearest class centroid on their features gets, on the same episodes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from test_partition import images_of

from cml_dist.config.load import parse_config
from cml_dist.data.build import build_domain
from cml_dist.data.shards import ShardSet
from cml_dist.nets.build import make_network
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console


def test_the_nearest_centroid_stands_beside_the_learners(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    weights = {"pretrained": str(tmp_path / "weights.pth"), "norm": "frozen"}
    settings = {
        "domain": {**images_of(tmp_path), "statistics": "set", "size": "set"},
        "model": {"backbone": "test_resnet", "colearner": {"depth": 0}, **weights},
        "method": {"inner_lr": 0.5, "inner_steps": 1},
        "train": {"steps": 1, "episodes_per_step": 1},
        "eval": {"val_episodes": 2, "episodes": 6, "untrained": False},
        "run": {"dir": str(tmp_path / "run")},
    }
    config = parse_config(settings)
    assert train(config, Console(interactive=False)).finished
    found = json.loads((tmp_path / "run" / "eval.json").read_text())["centroid"]
    scores = np.load(tmp_path / "run" / "eval_scores.npz")

    domain = build_domain(config.domain, train_seed=0, eval_seed=0)
    net = make_network(config, domain.input_shape, domain.output_dim)
    for index in range(6):
        episode = domain.prepare(domain.episode("test", index), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            pairs = [(net.body(b.inputs).pooled.numpy(), b.targets.numpy()) for b in episode.batches]
        (support, labels), (query, answers) = ((f / np.linalg.norm(f, axis=1, keepdims=True), t) for f, t in pairs)
        means = np.stack([support[labels == one].mean(0) for one in range(episode.ways)])
        nearest = np.linalg.norm(query[:, None] - means, axis=2).argmin(1)
        assert scores["centroid"][index] == pytest.approx((nearest == answers).mean())
    assert found["mean"] == pytest.approx(scores["centroid"].mean())
    assert found["meta"]["difference"] == pytest.approx((scores["meta"] - scores["centroid"]).mean())
    said = capsys.readouterr().out
    assert "nearest centroid" in said and "on the val episodes; meta-training has to beat it" in said
    assert "the nearest centroid on the features that training began with (paired)" in " ".join(said.split())


def test_a_centroid_head_on_features_of_one_length_begins_as_the_nearest_centroid(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    weights = {"pretrained": str(tmp_path / "weights.pth"), "norm": "frozen"}
    settings = {
        "domain": {**images_of(tmp_path), "statistics": "set"},
        "model": {"backbone": "test_resnet", "head": "centroid", "feature_length": 4, **weights},
        "method": {"name": "maml", "inner_steps": 0},
        "train": {"steps": 1, "episodes_per_step": 1},
        "eval": {"val_episodes": 2, "episodes": 6},
        "run": {"dir": str(tmp_path / "run")},
    }
    assert train(parse_config(settings), Console(quiet=True)).finished
    scores = np.load(tmp_path / "run" / "eval_scores.npz")
    np.testing.assert_array_equal(scores["untrained_meta"], scores["centroid"])


def test_without_trained_weights_there_is_none(tmp_path):
    settings = {"domain": images_of(tmp_path), "model": {"backbone": "conv4"}, "train": {"steps": 1}}
    settings |= {"eval": {"val_episodes": 1, "episodes": 2}, "run": {"dir": str(tmp_path / "run")}}
    assert train(parse_config(settings), Console(quiet=True)).finished
    assert "centroid" not in json.loads((tmp_path / "run" / "eval.json").read_text())


@pytest.mark.parametrize("statistics", ["weights", "set"])
def test_images_are_normalised_as_the_weights_own_were(statistics, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    settings = {
        "domain": {**images_of(tmp_path), "size": "set", **({"statistics": "set"} if statistics == "set" else {})},
        "model": {"backbone": "test_resnet", "pretrained": str(tmp_path / "weights.pth"), "norm": "frozen"},
        "train": {"steps": 1, "episodes_per_step": 1},
        "eval": {"val_episodes": 1, "episodes": 2, "untrained": False},
        "run": {"dir": str(tmp_path / "run")},
    }
    config = parse_config(settings)
    assert train(config, Console(quiet=True)).finished
    published, own = timm.get_pretrained_cfg("test_resnet"), ShardSet.open(config.domain.root).info
    expected = (published.mean, published.std) if statistics == "weights" else (own.mean, own.std)
    used = json.loads((tmp_path / "run" / "export" / "model.json").read_text())["preprocessing"]
    assert (used["mean"], used["std"]) == tuple(map(pytest.approx, map(list, expected)))
