"""CKA: against the unbiased estimate's definition as a mean over quadruples of examples, and its invariances."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from cml_dist.experiments.cka import cka, terms


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """The U-statistic of Song et al.: mean over distinct i, j, q, r of k_ij l_ij + k_ij l_qr - 2 k_ij l_iq."""
    k, l = x @ x.T, y @ y.T  # noqa: E741
    quadruples = [*permutations(range(len(x)), 4)]
    return sum(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in quadruples) / len(quadruples)


def batches(count=3, n=7, seed=0):
    generator = np.random.default_rng(seed)
    return [(x, x[:, :3] + 0.3 * generator.normal(size=(n, 3))) for x in generator.normal(size=(count, n, 5))]


def of(pairs) -> float:
    return float(cka(np.stack([terms(*map(torch.from_numpy, pair)).numpy() for pair in pairs])))


def test_it_is_the_ratio_of_sums_over_minibatches_of_the_unbiased_estimate():
    pairs = batches()
    both, ours, theirs = (sum(by_definition(*pair) for pair in each) for each in (
        pairs, [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs]
    ))  # fmt: skip
    assert of(pairs) == pytest.approx(both / np.sqrt(ours * theirs), rel=1e-10)
    assert 0.2 < of(pairs) < 0.98


def test_it_is_one_for_features_alike_up_to_rotation_scale_and_shift():
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))
    assert of([(x, x) for x, _ in batches()]) == pytest.approx(1, abs=1e-12)
    assert of([(x, 3 * x @ rotation + 2) for x, _ in batches()]) == pytest.approx(1, abs=1e-10)
    assert np.isnan(of([(x, np.ones_like(x)) for x, _ in batches()]))


def test_independent_features_are_about_zero_however_small_the_minibatch():
    generator = np.random.default_rng(2)
    values = [of([generator.normal(size=(2, 6, 20)) for _ in range(400)]) for _ in range(2)]
    assert np.abs(values).max() < 0.05  # a biased estimate is above 0.9 here
