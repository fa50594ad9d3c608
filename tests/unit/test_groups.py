"""Groups of pictures (a video, a patient): none has pictures in both support and query set of an episode."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from image_sets import pixels, png, write_folder

from cml_dist.cli import main
from cml_dist.config.load import load_config
from cml_dist.data.base import episode_rng
from cml_dist.data.build import build_domain
from cml_dist.data.groups import can_part, draw_parted
from cml_dist.data.set_shape import settled_shape
from cml_dist.data.shard_format import DATASET_FILE
from cml_dist.data.shards import ShardSet
from cml_dist.errors import DataError
from cml_dist.tools.pack import pack

CLASSES = 8
PATIENTS = (4, 3, 3)
"""Pictures of each patient of a class."""


def scans(shared: bool = False) -> dict[str, bytes]:
    """Class folders; patients are of one class each, or 'shared' by a class and the next."""
    files = {}
    for number in range(CLASSES):
        for patient, count in enumerate(PATIENTS):
            name = (number + (shared and patient == 2)) % CLASSES * 10 + (0 if shared and patient == 2 else patient)
            for image in range(count):
                picture = png(pixels(1000 * number + 10 * patient + image, 16))
                files[f"class{number}/patient{name:02d}_{image}.png"] = picture
    return files


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("groups")
    pack(write_folder(root / "scans", scans()), root / "set", group_by=r"patient(\d+)")
    return root / "set"


# --------------------------------------------------------------------------- drawing


def parted(groups, classes, numbers, shots):
    """The groups of support and of query pictures."""
    sides = [{int(groups[c][n]) for c, row in zip(classes, numbers, strict=True) for n in row[part]}
             for part in (slice(shots), slice(shots, None))]  # fmt: skip
    return sides


@pytest.mark.parametrize("shared", [False, True])
def test_no_group_is_on_both_sides_and_nothing_is_drawn_twice(shared):
    """Also of classes that share groups, over all classes of the episode."""
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 60, 40) if shared else 100 * c + rng.integers(0, 6, 40) for c in range(12)]
    for index in range(200):
        classes, numbers = draw_parted(episode_rng(0, "train", index), groups, 5, 5, 10)
        assert len(set(classes.tolist())) == 5 and numbers.shape == (5, 15)
        assert all(len(set(row)) == 15 and 0 <= min(row) and max(row) < 40 for row in numbers.tolist())
        support, query = parted(groups, classes, numbers, 5)
        assert not support & query


@pytest.mark.parametrize("sizes", [(1, 1), (5, 1), (4, 3, 3), (1, 2, 3, 4), (2, 2, 2), (1,) * 12, (7,)])
def test_what_can_be_parted_is_and_nothing_else(sizes):
    """Against all ways to choose the support's groups, up to the very limit."""
    groups = [np.repeat(np.arange(len(sizes)), sizes)]
    ways = [sum(n for n, chosen in zip(sizes, side, strict=True) if chosen)
            for side in product((False, True), repeat=len(sizes))]  # fmt: skip
    for shots, queries in product(range(1, sum(sizes)), repeat=2):
        possible = any(taken >= shots and sum(sizes) - taken >= queries for taken in ways)
        assert can_part(sizes, shots, queries) is possible
        if possible:
            for seed in range(3):
                _, numbers = draw_parted(np.random.default_rng(seed), groups, 1, shots, queries)
                support, query = parted(groups, [0], numbers, shots)
                assert numbers.shape == (1, shots + queries) and not support & query


def test_each_picture_is_as_often_on_each_side():
    groups, counts = [np.repeat(np.arange(6), 4)], np.zeros((2, 24))
    for seed in range(4000):
        _, numbers = draw_parted(np.random.default_rng(seed), groups, 1, 4, 8)
        counts[0, numbers[0, :4]] += 1
        counts[1, numbers[0, 4:]] += 1
    assert np.abs(counts[0] / 4000 - 4 / 24).max() < 0.03 and np.abs(counts[1] / 4000 - 8 / 24).max() < 0.03


def test_the_draw_stays_what_it_is_and_its_support_whatever_queries_is():
    groups = [np.repeat(np.arange(5), 6) + 5 * c for c in range(10)]
    drawn = [draw_parted(episode_rng(3, "train", 0), groups, 3, 2, queries) for queries in (1, 2, 5)]
    assert [drawn[1][0].tolist(), *drawn[1][1].tolist()] == DRAWN
    for classes, numbers in drawn:
        assert (classes == drawn[0][0]).all() and (numbers[:, :2] == drawn[0][1][:, :2]).all()


DRAWN = [[0, 1, 6], [11, 3, 23, 21], [0, 15, 21, 18], [26, 1, 10, 8]]


def test_classes_that_share_too_many_groups_are_refused():
    """Of three classes each two share one of two groups: whatever side the first takes, the last has none."""
    groups = [np.array([0, 1]), np.array([1, 2]), np.array([2, 0])]
    assert draw_parted(episode_rng(0, "val", 0), groups, 2, 1, 1)[1].shape == (2, 2)
    with pytest.raises(DataError, match="no 3 of them were found .* lower domain.ways"):
        draw_parted(episode_rng(0, "val", 0), groups, 3, 1, 1)


# --------------------------------------------------------------------------- a packed set


def domain_of(root: Path, *settings: str):
    config = load_config("my_images", [f"domain.root={root}", *settings])
    return build_domain(settled_shape(config).domain, train_seed=0, eval_seed=0)


def test_episodes_of_a_set_keep_groups_apart_and_are_pure_functions(packed):
    shards = ShardSet.open(packed)
    patient = {shards.decode(image).tobytes(): shards.key(image).split("_")[0] for image in range(len(shards))}
    assert len(set(patient.values())) == CLASSES * len(PATIENTS)
    for settings in ((), ("domain.augment.rotate_classes=true",)):
        domain, other = (domain_of(packed, "domain.ways=2", *settings) for _ in range(2))
        for index in range(50):
            episode, again = domain.episode("train", index), other.episode("train", index)
            assert episode.support.inputs.equal(again.support.inputs) and episode.query.inputs.equal(again.query.inputs)
            inputs = [batch.inputs.numpy() for batch in episode.batches]
            turned = ([np.rot90(each, turns, (2, 3)) for turns in range(4)] for each in inputs)
            support, query = ({patient.get(image.tobytes()) for images in each for image in images} for each in turned)
            assert support & query <= {None} and len(support | query) > 2


def test_the_shape_follows_from_what_groups_allow(packed):
    """Of patients with 4, 3 and 3 pictures one side can have 6, the other one 4; without groups it were 5 and 5."""
    told = []
    config = load_config("my_images", [f"domain.root={packed}"])
    found = settled_shape(config, told.append).domain
    assert (found.shots, found.queries) == (4, 6) and "no group of images is parted" in told[0]
    with pytest.raises(DataError, match="domain.queries, those of a group for one of both.*lower shots or queries"):
        domain_of(packed, "domain.shots=5", "domain.queries=5")


def test_pack_and_inspect_tell_of_groups(tmp_path, capfd):
    files = scans()
    files |= {f"lonely/patient99_{n}.png": png(pixels(9000 + n, 16)) for n in range(5)}
    source, dest = write_folder(tmp_path / "scans", files), tmp_path / "set"
    assert main(["data", "pack", str(source), str(dest), "--group-by", r"patient\d+"]) == 0
    out, err = capfd.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert "split classes images groups a class".split() in rows and any(row[-2:] == ["12", "3"] for row in rows)
    assert "(--group-by)" in out
    assert "1 classes of fewer than 2 groups are left out: lonely" in err
    assert main(["data", "inspect", str(dest), "--ways", "2", "--sheet", str(tmp_path / "sheet.png")]) == 0
    out = capfd.readouterr().out
    assert r"Groups by 'patient\d+'" in out and "2 ways, 1 shots" in out
    assert any(line.split()[-2:] == ["12", "3"] for line in out.splitlines())


def test_a_set_without_groups_is_as_it_was_and_one_with_groups_is_another_set(packed, tmp_path):
    pack(packed.parent / "scans", tmp_path / "set")
    plain, grouped = (json.loads((root / DATASET_FILE).read_text()) for root in (tmp_path / "set", packed))
    assert (plain["format_version"], grouped["format_version"]) == (1, 2) and "group_by" not in plain
    with np.load(tmp_path / "set" / "index.npz") as index:
        assert index.files == ["split", "class_number", "shard", "offset", "size", "key"]
    assert [shard["sha256"] for shard in plain["shards"]] == [shard["sha256"] for shard in grouped["shards"]]
    shape = ("domain.shots=1", "domain.queries=1")
    assert domain_of(tmp_path / "set", *shape).fingerprint() != domain_of(packed, *shape).fingerprint()
    (tmp_path / "set" / DATASET_FILE).write_text(json.dumps({**plain, "format_version": 2, "group_by": "x"}))
    with pytest.raises(DataError, match="index.npz is damaged"):
        ShardSet.open(tmp_path / "set")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("nobody", "matches none of 80 pictures"), ("class0", "matches 10 of 80 pictures .*not class1/.*, for one"),
     ("(", "is no regular expression"), ("class.", "no class has images of 2 groups")],
)  # fmt: skip
def test_a_pattern_that_groups_nothing_is_refused(tmp_path, pattern, said):
    source = write_folder(tmp_path / "scans", scans())
    with pytest.raises(DataError, match=said):
        pack(source, tmp_path / "set", group_by=pattern)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("pattern", "shared", "said"),
    [(r"\w+/\w+", False, "each picture is a group of its own: --group-by changes nothing"),
     (r"patient\d+", True, "groups have pictures in two splits: 'patient")],
)  # fmt: skip
def test_what_may_be_meant_otherwise_is_said(tmp_path, pattern, shared, said):
    report = pack(write_folder(tmp_path / "scans", scans(shared)), tmp_path / "set", group_by=pattern)
    assert [note for note in report.warnings if said in note] == list(report.warnings)
