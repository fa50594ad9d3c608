"""Classes and images are drawn without replacement, evenly, and from the episode's generator alone."""

from __future__ import annotations

import numpy as np
import pytest

from cml_dist.data.base import SPLITS, episode_rng
from cml_dist.data.sampling import draw

SIZES = np.array([6, 9, 20, 7, 6, 11])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("index", range(20))
def test_no_replacement_and_in_range(index, version):
    classes, images = draw(episode_rng(3, "train", index), SIZES, ways=4, images=6, version=version)
    assert len(set(classes.tolist())) == 4
    assert classes.min() >= 0 and classes.max() < len(SIZES)
    for number, row in zip(classes, images, strict=True):
        assert len(set(row.tolist())) == 6
        assert row.min() >= 0 and row.max() < SIZES[number]


def test_the_first_images_are_the_same_however_many_are_drawn_and_so_is_what_is_drawn_next():
    def drawn(images, version=2):
        rng = episode_rng(3, "train", 0)
        classes, numbers = draw(rng, SIZES, ways=4, images=images, version=version)
        return [*classes.tolist(), *numbers[:, :2].ravel().tolist(), rng.random()]

    assert drawn(2) == drawn(3) == drawn(6)
    assert drawn(2, version=1) != drawn(6, version=1)


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        (1, [[4, 8, 38], [15, 11, 0, 13], [8, 10, 3, 5], [17, 1, 8, 7]]),
        (2, [[4, 8, 38], [9, 17, 12, 18], [16, 18, 7, 6], [5, 0, 3, 15]]),
    ],
)
def test_a_version_stays_what_it_is(version, numbers):
    """Runs of it go on: these numbers never change."""
    classes, images = draw(episode_rng(3, "train", 0), np.full(50, 20), ways=3, images=4, version=version)
    assert [classes.tolist(), *images.tolist()] == numbers


def test_a_draw_of_everything_uses_everything():
    classes, images = draw(episode_rng(0, "val", 0), np.array([5, 5, 5]), ways=3, images=5)
    assert sorted(classes.tolist()) == [0, 1, 2]
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in images.tolist())


def test_the_same_seed_split_and_index_give_the_same_draw_and_each_of_them_matters():
    def drawn(seed, split, index):
        classes, images = draw(episode_rng(seed, split, index), np.full(50, 20), ways=5, images=6)
        return (*classes.tolist(), *images.reshape(-1).tolist())

    variants = [drawn(seed, split, index) for seed in (0, 1) for split in SPLITS for index in (0, 1)]
    assert len(set(variants)) == len(variants)
    assert drawn(1, "test", 1) == variants[-1]


def test_every_class_is_drawn_equally_often():
    counts = np.zeros(len(SIZES))
    for index in range(3000):
        counts[draw(episode_rng(0, "train", index), SIZES, ways=3, images=2)[0]] += 1
    # Each class is expected in half of the episodes: 1500, with a standard deviation of 27.
    assert np.abs(counts - 1500).max() < 5 * 27.4
