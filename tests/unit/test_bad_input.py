"""Bad input ends the command with one clear line and a code, before anything is written."""

from __future__ import annotations

import json

import pytest
import yaml
from image_sets import write_set

from cml_dist.cli import main
from cml_dist.data.shards import ShardSet

SETTINGS = {
    "model": {"backbone": "conv4", "filters": 4},
    "train": {"steps": 2, "episodes_per_step": 1},
    "eval": {"every": 0, "val_episodes": 2, "episodes": 2, "untrained": False},
    "parallel": {"threads": 1},
}


@pytest.fixture
def packed(tmp_path):
    return write_set(tmp_path / "packed", images=4, size=32)


@pytest.fixture
def attempt(tmp_path, packed, capfd):
    """Runs ``cml-dist train`` on the packed set; returns (exit code, the lines on standard error)."""

    def go(*overrides):
        domain = {"name": "images", "root": str(packed), "ways": 3, "shots": 1, "queries": 2}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**SETTINGS, "domain": domain, "run": {"dir": str(tmp_path / "run")}}))
        capfd.readouterr()
        code = main(["train", str(path), *overrides])
        return code, capfd.readouterr().err

    return go


def refused(result, *words):
    code, err = result
    assert code not in (0, None)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def test_after_the_mend_the_same_folder_trains_and_resumes_with_its_own_data_alone(attempt, tmp_path, packed):
    refused(attempt("domain.queries=4"))
    assert attempt() == (0, "")
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["meta"]["episodes"] == 2
    other = write_set(tmp_path / "other", images=5, size=32)
    refused(attempt(f"domain.root={other}", "train.steps=4"), "data is not that of the run", "domain.root")
    packed.rename(tmp_path / "moved")
    assert attempt(f"domain.root={tmp_path / 'moved'}", "train.steps=4")[0] == 0


def test_a_card_names_the_set_that_was_used(attempt, tmp_path):
    assert attempt("domain.name=omniglot")[0] == 0
    assert "on small" in (tmp_path / "run" / "export" / "README.md").read_text().partition("\n# ")[2].splitlines()[0]


def test_missing_set(attempt, tmp_path):
    refused(attempt(f"domain.root={tmp_path / 'nowhere'}"), "nowhere", "data pack")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_missing_shard(attempt, packed):
    (packed / "val-000000.tar").unlink()
    refused(attempt(), "val-000000.tar")


def test_truncated_shard(attempt, packed):
    shard = packed / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    refused(attempt(), "train-000000.tar")


def test_undecodable_image_is_named(attempt, packed):
    shards = ShardSet.open(packed)
    shard, data = packed / "train-000000.tar", shards.read(5)
    shard.write_bytes(shard.read_bytes().replace(data, b"\0" * len(data)))
    result = attempt()
    refused(result, shards.key(5), shard.name, "(it is not an image)")
    assert "0x" not in result[1]


def test_classes_too_small_are_named(attempt):
    refused(attempt("domain.queries=4"), "train-0", "4")
    refused(attempt("domain.ways=5"), "5", "4 classes")


def test_images_too_small_for_the_network(attempt, tmp_path, packed):
    small = write_set(tmp_path / "small", images=4, size=8)
    refused(attempt(f"domain.root={small}"), "8x8", "conv4")


def test_unknown_backbone_and_its_nearest_names(attempt, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    refused(attempt("model.backbone=resnet81", f"run.dir={tmp_path}/runs/new/a"), "resnet81", "resnet")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "config.yaml"])  # nothing of a run


def test_a_folder_that_was_there_stays(attempt, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(attempt("model.backbone=resnet81", f"run.dir={tmp_path}/empty"), "resnet81")
    assert list((tmp_path / "empty").iterdir()) == []


def test_vectors_do_not_fit_an_image_network(attempt):
    refused(attempt("model.backbone=mlp"), "mlp", "vectors")


def test_statistics_that_do_not_fit(attempt):
    refused(attempt("domain.mean=[0.5]", "domain.std=[0.5]"), "domain.mean")
