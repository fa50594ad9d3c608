"""Sinusoid regression: what is drawn, and that it depends on nothing but (seed, split, index)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cml_dist.config.schema import SinusoidConfig
from cml_dist.data.base import episode_rng
from cml_dist.data.build import build_domain
from cml_dist.data.sinusoid import SinusoidDomain
from cml_dist.errors import ConfigError


def make(train_seed: int = 1, eval_seed: int = 2, **settings: object) -> SinusoidDomain:
    config = SinusoidConfig(name="sinusoid", **settings)
    return build_domain(config, train_seed=train_seed, eval_seed=eval_seed)


def wave(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Amplitude, phase and largest residual of y = A sin(x - phase) = p sin x + q cos x, by least squares."""
    basis = np.stack([np.sin(x), np.cos(x)], axis=1)
    (p, q), *_ = np.linalg.lstsq(basis, y, rcond=None)
    return math.hypot(p, q), math.atan2(-q, p), float(np.abs(basis @ [p, q] - y).max())


def points(episode) -> tuple[np.ndarray, np.ndarray]:
    x = torch.cat([episode.support.inputs, episode.query.inputs]).numpy()[:, 0]
    y = torch.cat([episode.support.targets, episode.query.targets]).numpy()[:, 0]
    return x, y


def same(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(points(first), points(second), strict=True))


def test_shapes_and_meaning():
    domain = make(shots=5, queries=7)
    assert isinstance(domain, SinusoidDomain)
    episode = domain.episode("train", 3)
    assert episode.support.inputs.shape == episode.support.targets.shape == (5, 1)
    assert episode.query.inputs.shape == episode.query.targets.shape == (7, 1)
    assert episode.support.inputs.dtype == episode.query.targets.dtype == torch.float64
    assert (episode.split, episode.index) == ("train", 3)
    assert (domain.input_shape, domain.output_dim) == ((1,), 1)
    assert (domain.score_name, domain.higher_is_better, domain.chance) == ("mse", False, None)


def test_the_formula_by_hand():
    domain = make(train_seed=7, shots=2, queries=1)
    rng = episode_rng(7, "train", 11)
    amplitude = 0.1 + 4.9 * rng.random()
    phase = math.pi * rng.random()
    expected_x = [-5 + 10 * rng.random() for _ in range(3)]
    expected_y = [amplitude * math.sin(x - phase) for x in expected_x]
    x, y = points(domain.episode("train", 11))
    assert x == pytest.approx(expected_x, abs=1e-12)
    assert y == pytest.approx(expected_y, abs=1e-12)


def test_support_and_query_lie_on_one_wave_within_the_ranges():
    domain = make(shots=10, queries=10)
    found = []
    for index in range(400):
        x, y = points(domain.episode("train", index))
        amplitude, phase, residual = wave(x, y)
        assert residual < 1e-10
        assert 0.1 <= amplitude <= 5.0
        assert 0.0 <= phase <= math.pi
        assert -5.0 <= x.min() and x.max() <= 5.0
        found.append((amplitude, phase, x.mean()))
    mean_amplitude, mean_phase, mean_x = np.mean(found, axis=0)
    # Five standard errors of the mean of 400 uniform draws (and of 8000 for x).
    assert abs(mean_amplitude - 2.55) < 5 * 4.9 / math.sqrt(12 * 400)
    assert abs(mean_phase - math.pi / 2) < 5 * math.pi / math.sqrt(12 * 400)
    assert abs(mean_x) < 5 * 10 / math.sqrt(12 * 8000)
    deciles = np.histogram([row[0] for row in found], bins=10, range=(0.1, 5.0))[0]
    assert deciles.min() >= 15  # 40 expected in each, standard deviation 6


def test_every_other_episode_of_the_mixed_family_is_a_line_and_the_others_are_the_same_waves():
    domain, waves = make(family="mixed"), make()
    slopes, intercepts = [], []
    for index in range(400):
        x, y = points(domain.episode("test", index))
        if index % 2 == 0:
            assert same(domain.episode("test", index), waves.episode("test", index))
            continue
        slope, intercept = np.polyfit(x, y, 1)
        assert np.abs(slope * x + intercept - y).max() < 1e-10
        slopes.append(slope)
        intercepts.append(intercept)
    for found in (slopes, intercepts):
        assert -3 <= min(found) < -2.8 and 2.8 < max(found) <= 3
        assert abs(np.mean(found)) < 5 * 6 / math.sqrt(12 * 200)


@pytest.mark.parametrize("family", ["sinusoid", "mixed"])
def test_the_grid_is_the_curve_of_the_episode_without_noise(family):
    noisy, clean = make(family=family, noise=0.3, shots=500), make(family=family, shots=500)
    for index in range(2):
        grid = noisy.grid("test", index)
        assert grid.inputs.shape == grid.targets.shape == (101, 1)
        assert torch.allclose(grid.inputs[:, 0], torch.linspace(-5, 5, 101, dtype=torch.float64))
        x, y = points(clean.episode("test", index))
        order = np.argsort(x)
        assert np.interp(grid.inputs[5:-5, 0], x[order], y[order]) == pytest.approx(grid.targets[5:-5, 0], abs=0.02)


def test_an_episode_depends_on_seed_split_and_index_alone():
    domain = make()
    late = domain.episode("val", 5)
    for index in (9, 0, 3):
        domain.episode("val", index)
    torch.manual_seed(99)
    np.random.seed(99)
    assert same(domain.episode("val", 5), late)
    assert same(make().episode("val", 5), late)
    assert not same(domain.episode("val", 6), late)
    assert not same(domain.episode("test", 5), late)


def test_train_seed_moves_train_only_and_eval_seed_the_others_only():
    base, other_train, other_eval = make(1, 2), make(3, 2), make(1, 3)
    assert not same(base.episode("train", 0), other_train.episode("train", 0))
    assert same(base.episode("train", 0), other_eval.episode("train", 0))
    for split in ("val", "test"):
        assert same(base.episode(split, 0), other_train.episode(split, 0))
        assert not same(base.episode(split, 0), other_eval.episode(split, 0))


def test_noise_is_on_the_targets_alone():
    clean, noisy = make(shots=500, queries=500), make(shots=500, queries=500, noise=0.3)
    x, y = points(clean.episode("train", 0))
    noisy_x, noisy_y = points(noisy.episode("train", 0))
    assert np.array_equal(x, noisy_x)
    assert 0.25 < (noisy_y - y).std() < 0.35
    assert abs((noisy_y - y).mean()) < 0.05


def test_the_support_set_is_the_same_whatever_queries_is():
    def support(queries, **settings):
        return make(queries=queries, noise=0.3, **settings).episode("train", 3).support.targets

    assert torch.equal(support(3), support(30))
    assert not torch.equal(support(3, draw=1), support(30, draw=1))  # earlier versions' noise


def test_prepare_casts_and_keeps_the_values():
    domain = make()
    episode = domain.episode("test", 4)
    ready = domain.prepare(episode, torch.device("cpu"), torch.float32)
    assert ready.support.inputs.dtype == ready.query.targets.dtype == torch.float32
    assert torch.equal(ready.query.targets, episode.query.targets.float())
    assert (ready.split, ready.index) == ("test", 4)
    exact = domain.prepare(episode, torch.device("cpu"), torch.float64)
    assert torch.equal(exact.support.inputs, episode.support.inputs)


def test_loss_and_score_are_the_mean_squared_error():
    domain = make()
    outputs = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    loss = domain.loss(outputs, targets)
    assert loss.item() == pytest.approx((0 + 4 + 9) / 3)
    (gradient,) = torch.autograd.grad(loss, outputs, create_graph=True)
    assert gradient.flatten().tolist() == pytest.approx([0, 4 / 3, 2])
    (curvature,) = torch.autograd.grad(gradient.sum(), outputs)
    assert curvature.flatten().tolist() == pytest.approx([2 / 3] * 3)
    score = domain.score(outputs, targets)
    assert score.item() == pytest.approx(13 / 3)
    assert not score.requires_grad


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="'dev'"):
        make().episode("dev", 0)
