"""Operators with second derivatives written out, against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cml_dist.nets.guard import prepare_for_second_order
from cml_dist.nets.second_order import WRITTEN_OUT

CASES = {
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 5, 5)),
    "convolution without bias": (nn.Conv2d(4, 6, 3, bias=False), (3, 4, 5, 5)),
    "strided, in groups": (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (3, 4, 7, 6)),
    "batch norm": (nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 5, 5)),
    "max-pool": (nn.MaxPool2d(2), (3, 4, 5, 6)),
}
PATTERNS = [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (True, True, False)]
"""Which of the gradients by inputs, weight and bias are differentiated again."""


def made(name: str, layout: torch.memory_format) -> tuple[nn.Module, torch.Tensor]:
    module, shape = CASES[name]
    module = copy.deepcopy(module).double()
    torch.manual_seed(5)
    for value in module.parameters():
        nn.init.normal_(value)
    inputs = torch.randint(-3, 4, shape).double()  # integers: many a square has several maxima
    inputs = inputs if name == "max-pool" else inputs + 0.1 * torch.randn(shape)
    return module, inputs.contiguous(memory_format=layout).requires_grad_()


def derivatives(name: str, pattern: tuple[bool, ...], layout: torch.memory_format, *, ours: bool) -> list[torch.Tensor]:
    module, inputs = made(name, layout)
    if ours:
        prepare_for_second_order(module, "batch")
        assert type(module) in WRITTEN_OUT.values()
    at = [inputs, *module.parameters()]
    out = module(inputs)
    torch.manual_seed(6)
    g = torch.randn(out.shape, dtype=out.dtype).contiguous(memory_format=layout).requires_grad_()
    first = torch.autograd.grad(out, at, g, create_graph=True)
    again = [one for one, counts in zip(first, pattern, strict=False) if counts]
    if not again:
        return [out, *first]
    vectors = [torch.randn(one.shape, dtype=one.dtype) for one in again]
    return [out, *first, *torch.autograd.grad(again, [*at, g], vectors, materialize_grads=True)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: "".join("xwb"[i] for i in range(3) if pattern[i]))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
def test_value_and_both_derivatives_are_those_of_torch(name, pattern, layout):
    got, expected = (derivatives(name, pattern, layout, ours=ours) for ours in (True, False))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_statistics_of_a_batch_norm_are_those_of_float64(layout):
    """To 2e-6 for 100,000 values a channel: what is further off switches ReLUs behind it."""
    torch.manual_seed(0)
    inputs = (2 * torch.randn(100, 4, 32, 32) + 1).contiguous(memory_format=layout)
    norm = WRITTEN_OUT[nn.BatchNorm2d](4, track_running_stats=False)
    error = norm(inputs).double() - norm.double()(inputs.double())
    assert error.abs().max() < 2e-6
