"""From a folder of one's own pictures to a run: what nobody said follows from the pictures, and is written down."""

from __future__ import annotations

import re

import pytest
from image_sets import own_pictures, write_folder

from cml_dist.cli import main
from cml_dist.config.load import load_config
from cml_dist.errors import ConfigError
from cml_dist.run.folder import RunFolder, run_config
from cml_dist.run.status import read_status

SIZES = [(40, 30), (30, 40), (33, 52), (64, 48)]
"""Landscape and portrait."""
SHORT = ["train.steps=2", "eval.every=1", "eval.val_episodes=2", "eval.episodes=2", "model.filters=4", "run.device=cpu"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    pictures = write_folder(root / "pictures", own_pictures(9, SIZES, images=6))
    assert main(["data", "pack", str(pictures), str(root / "set")]) == 0
    return root / "set"


@pytest.fixture
def words(packed, tmp_path):
    return ["my_images", f"domain.root={packed}", f"run.dir={tmp_path / 'run'}", *SHORT]


def shape(config):
    return config.domain.ways, config.domain.shots, config.domain.queries


def test_the_shape_of_an_episode_follows_from_the_set_and_the_run_keeps_it(words, tmp_path, capfd):
    assert main(["train", *words]) == 0
    said = capfd.readouterr().out
    assert "2-way 3-shot, 3 queries a class, from the set (the smallest split has 2 classes" in said
    assert "domain: images, 2-way 3-shot, 3 queries a class" in said
    run = RunFolder(tmp_path / "run")
    assert shape(run.read_config()) == (2, 3, 3)
    assert main(["train", *words, "train.steps=3"]) == 0
    assert "Resuming at step 2 of 3" in capfd.readouterr().out
    assert read_status(run.status_file).step == 3
    assert shape(run_config(run.path, ["domain.shots=null"])) == (2, 3, 3)
    assert main(["eval", str(run.path)]) == 0
    assert main(["train", *words, "domain.shots=1"]) == 1
    assert "domain.shots was 3, is 1" in capfd.readouterr().err
    launched = ["launch", "slurm", *words, "train.steps=3", "--processes-per-node=1", "--time=1:00", "--dry-run"]
    assert main(launched) == 0


def test_what_would_happen_is_shown_with_its_source_or_with_what_is_missing(packed, words, capsys):
    assert main(["config", *words]) == 0
    assert re.search(r"^domain.ways: 2 +# the set in domain.root$", capsys.readouterr().out, re.M)
    assert main(["config", "my_images", "domain.root=nowhere"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^domain.ways: null +# the set in domain.root, which is not here$", told, re.M)
    assert main(["train", "my_images", "domain.root=nowhere"]) == 1
    assert "no packed image set at nowhere" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="domain.root is not set"):
        load_config("my_images")


@pytest.mark.parametrize(
    ("root", "said"),
    [("set", "2-way 3-shot, 3 queries a class, as follows from the set"), ("elsewhere", "5-way 5-shot, 15 queries")],
)
def test_a_plan_needs_no_set(packed, root, said, capsys):
    images = ["--image-size", "32", "--channels", "3"]
    set_ = f"domain.root={packed.parent / root}"
    assert main(["plan", "my_images", set_, "--gpus", "1", "--gpu-memory-gib", "8", *images]) == 0
    assert f"episode: {said}" in capsys.readouterr().out


def test_a_split_of_one_class_makes_no_episode(tmp_path, capfd):
    pictures = write_folder(tmp_path / "pictures", own_pictures(6, SIZES, images=4))
    assert main(["data", "pack", str(pictures), str(tmp_path / "set"), "--splits", "70,15,15"]) == 0
    assert main(["train", "my_images", f"domain.root={tmp_path / 'set'}", f"run.dir={tmp_path / 'run'}", *SHORT]) == 1
    assert "has 1 class, and an episode needs 2 or more" in capfd.readouterr().err


def test_distractors_leave_two_classes_for_the_episode(packed, tmp_path, capfd):
    words = ["domain.unlabelled=1", "domain.distractors=1", f"run.dir={tmp_path / 'run'}", *SHORT]
    assert main(["train", "my_images", f"domain.root={packed}", *words]) == 1
    said = "has 2 classes, and an episode needs 2 or more beside its 1 distractors; lower domain.distractors"
    assert said in capfd.readouterr().err


def test_a_folder_of_another_run_is_said(words, tmp_path, capfd):
    quick = ["train.steps=1", "eval.val_episodes=1", "eval.final=false"]
    assert main(["train", "sinusoid", f"run.dir={tmp_path / 'run'}", *quick]) == 0
    assert main(["train", *words]) == 1
    assert "domain.name was 'sinusoid', is 'images'" in capfd.readouterr().err


def test_a_class_in_two_folders_is_not_drawn_apart(tmp_path, capfd):
    files = own_pictures(6, SIZES, images=3)
    twice = {f"{who}/{name}": data for who in ("alice", "bob") for name, data in files.items()}
    assert main(["data", "pack", str(write_folder(tmp_path / "pictures", twice)), str(tmp_path / "set")]) == 1
    assert " twice, alice/" in capfd.readouterr().err
