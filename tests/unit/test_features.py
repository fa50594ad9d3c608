"""Features of a frozen body are computed once: the run is the same, and what it leaves reads pictures as before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_sets import write_set

import cml_dist
from cml_dist.cli import main
from cml_dist.config.load import parse_config
from cml_dist.data.build import build_domain
from cml_dist.errors import ConfigError
from cml_dist.run.export import read_weights
from cml_dist.run.folder import run_config
from cml_dist.run.trainer import train
from cml_dist.telemetry.console import Console


def run_of(folder: Path, name: str, sections: dict | None = None) -> Path:
    """A run on weights of a test_resnet whose body is frozen, with other settings in ``sections``."""
    if not (folder / "weights.pth").exists():
        torch.manual_seed(0)
        torch.save(timm.create_model("test_resnet").state_dict(), folder / "weights.pth")
        write_set(folder / "set", images=12, size=32)
    settings = {
        "domain": {"name": "images", "root": str(folder / "set"), "ways": 3, "shots": 2, "queries": 3, "size": "set"},
        "model": {
            "backbone": "test_resnet", "pretrained": str(folder / "weights.pth"), "norm": "frozen",
            "trained": ["head"],
        },
        "method": {"name": "maml", "inner_steps": 2, "inner_lr": 3.0},
        "train": {"steps": 3, "episodes_per_step": 2},
        "eval": {"every": 2, "val_episodes": 3, "episodes": 4},
        "parallel": {"threads": 1},
        "run": {"dir": str(folder / name), "precision": "fp64"},
    }  # fmt: skip
    settings = {key: value | (sections or {}).get(key, {}) for key, value in settings.items()}
    assert train(parse_config(settings), Console()).finished
    return folder / name


def steps_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"method": {"name": "cml", "inner_lr": 3.0}, "model": {"colearner": {"kind": "dense", "depth": 1}}},
        {"model": {"head": "ridge"}, "domain": {"memory_gib": 0}},
    ],
    ids=["maml", "cml", "ridge on disk"],
)
def test_a_run_with_kept_features_is_the_run(sections, tmp_path, capsys):
    kept, again = (
        run_of(tmp_path, way, {**sections, "domain": {"features": way, **sections.get("domain", {})}})
        for way in ("keep", "compute")
    )
    said = " ".join(capsys.readouterr().out.split())
    place = f"a file in {kept}" if "domain" in sections else "memory"
    told = "The body is frozen: the features of 72 train, 48 val, 48 test images are computed once and kept in"
    assert said.count(told) == 1 and f"{told} {place}" in said
    for one, other in zip(steps_of(kept), steps_of(again), strict=True):
        for key in ("loss", "outer_loss", "grad_norm", "colearner_loss"):
            assert one.get(key) == (other.get(key) and pytest.approx(other[key], rel=1e-10, abs=1e-10))
    ours, theirs = (read_weights(run / "export") for run in (kept, again))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7)  # written in float32
    scores = [np.load(run / "eval_scores.npz") for run in (kept, again)]
    assert set(scores[0]) == set(scores[1]) >= {"meta", "untrained_meta", "centroid"}
    assert all((scores[0][name] == scores[1][name]).all() for name in scores[0])

    # The export reads pictures: it answers as was tested.
    config = run_config(kept, [])
    domain, learner = build_domain(config.domain, train_seed=0, eval_seed=config.eval.seed), cml_dist.load(kept)
    for index in range(2):
        episode = domain.episode("test", index)
        adapted = learner.adapt(list(episode.support.inputs.numpy()), episode.support.targets)
        right = np.array(adapted.predict(list(episode.query.inputs.numpy()))) == episode.query.targets.numpy()
        assert right.mean() == pytest.approx(scores[0]["meta"][index])


def test_a_resumed_run_and_a_later_test_are_the_same_bits(tmp_path, capsys):
    single = {"run": {"precision": "fp32", "dir": str(tmp_path / "whole")}}
    whole = run_of(tmp_path, "whole", single | {"train": {"steps": 6, "episodes_per_step": 2}})
    single["run"]["dir"] = str(tmp_path / "halves")
    for steps in (3, 6):
        halves = run_of(tmp_path, "halves", single | {"train": {"steps": steps, "episodes_per_step": 2}})
    ours, theirs = (read_weights(run / "export") for run in (whole, halves))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    before = np.load(whole / "eval_scores.npz")["meta"]
    capsys.readouterr()
    assert main(["eval", str(whole)]) == 0
    assert "features of 48 test images" in " ".join(capsys.readouterr().out.split())
    assert (np.load(whole / "eval_scores.npz")["meta"] == before).all()


def test_a_network_of_which_nothing_is_trained_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="model.head centroid has no parameters: nothing would be trained"):
        run_of(tmp_path, "run", {"model": {"head": "centroid"}})


@pytest.mark.parametrize(
    ("sections", "kept"),
    [
        ({"model": {"trained": ["head", "last:1"]}}, None),
        ({"model": {"norm": "batch"}}, None),
        ({"domain": {"augment": {"flip": True}}}, "48 val, 48 test images"),
        ({"train": {"steps": 1, "episodes_per_step": 2}, "eval": {"val_episodes": 1, "episodes": 4}}, "48 test images"),
    ],
    ids=["trained body", "batch statistics", "augmentation", "a short run"],
)
def test_what_changes_or_does_not_pay_is_computed_in_each_pass(sections, kept, tmp_path, capsys):
    run_of(tmp_path, "run", sections)
    said = " ".join(capsys.readouterr().out.split())
    assert ("The body is frozen" in said) is (kept is not None)
    assert kept is None or f"the features of {kept}" in said
