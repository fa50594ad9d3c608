"""The outer optimizer and its schedule."""

from __future__ import annotations

import math

import pytest
import torch
from toy import accuracy, cross_entropy, make_net

from cml_dist.config.schema import OptimConfig
from cml_dist.distributed.optim import build_optimizer, learning_rate, set_rate
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import Method


def make_model() -> MetaModel:
    return MetaModel(make_net("map"), cross_entropy, accuracy, Method.sgd(1, 0.1, 0.1), "graph")


def test_schedules():
    def rates(**settings):
        config = OptimConfig(lr=1.0, **settings)
        return [learning_rate(config, step, 10) for step in range(10)]

    assert rates() == [1.0] * 10
    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(schedule="step", step_every=4) == [1.0] * 4 + [0.5] * 4 + [0.25] * 2
    assert rates(schedule="step", step_every=4, warmup_steps=2) == [0.5] + [1.0] * 5 + [0.5] * 4  # from step 2 on
    earlier = rates(schedule="step", step_every=4, warmup_steps=2, step_from="start")
    assert earlier == [0.5] + [1.0] * 3 + [0.5] * 4 + [0.25] * 2
    assert rates(schedule="linear") == pytest.approx([1 - s / 10 for s in range(10)])
    assert rates(schedule="cosine", final_lr_factor=0.1) == pytest.approx(
        [0.1 + 0.9 * (1 + math.cos(math.pi * s / 10)) / 2 for s in range(10)]
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_final_factor_is_reached_one_step_after_the_last(schedule):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=2, final_lr_factor=0.1)
    assert learning_rate(config, 9, 10) > 0.1 and learning_rate(config, 10, 10) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "cls"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_the_optimizer_that_was_asked_for_with_its_groups(name, cls):
    model = make_model()
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=0.1), model)
    assert type(optimizer) is cls
    assert {g["lr_scale"] for g in optimizer.param_groups} == {1.0}
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(model.names)
    for canonical, value in zip(model.names, model.values, strict=True):
        assert decays[id(value)] == (0.1 if value.ndim >= 2 else 0.0), canonical


def test_the_body_moves_by_a_part_of_the_step_size():
    model = make_model()
    before = {name: value.clone() for name, value in model.params().items()}
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=1.0, body_lr_scale=0.25), model)
    for value in model.values:
        value.grad = torch.ones_like(value)
    set_rate(optimizer, 0.5)
    optimizer.step()
    for name, value in model.params().items():
        step = 0.125 if name.startswith("body.") else 0.5
        assert torch.allclose(before[name] - value, torch.full_like(value, step)), name
