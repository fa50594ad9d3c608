"""The global norm: what it is, and that zeros change no bit of it."""

from __future__ import annotations

import math

import pytest
import torch

from cml_dist.distributed.strategy import global_norm


def test_tensors_of_zeros_change_no_bit():
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 40):
        tensors = [torch.randn(7, 5, generator=generator) for _ in range(count)]
        assert global_norm([*tensors, *(torch.zeros(3) for _ in range(count % 9))]) == global_norm(tensors)


def test_it_is_the_l2_norm_of_all_elements():
    tensors = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    assert global_norm(tensors) == pytest.approx(torch.cat([t.flatten() for t in tensors]).norm().item(), rel=1e-14)
    assert global_norm([]) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_is_seen(bad):
    assert not math.isfinite(global_norm([torch.ones(3), torch.tensor([1.0, bad]), torch.ones(2)]))
