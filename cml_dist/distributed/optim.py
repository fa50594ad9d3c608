"""The outer optimizer (torch's own, with weight-decay groups), and its step size as a function of the step."""

from __future__ import annotations

import math

import torch

from cml_dist.config.schema import OptimConfig
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import part_of
from cml_dist.types import BODY, RULE


def build_optimizer(config: OptimConfig, model: MetaModel) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW on all meta-parameters; :func:`set_rate` gives each group its step size.

    Weight decay is for the network's weights of two and more dimensions; never for what a rule learns. The body's step
    size is ``body_lr_scale`` of the others'.
    """

    found: dict[tuple[float, bool], list[torch.Tensor]] = {}
    for name, value in zip(model.names, model.values, strict=True):
        scale = config.body_lr_scale if part_of(name) == BODY else 1.0
        found.setdefault((scale, value.ndim >= 2 and part_of(name) != RULE), []).append(value)
    groups = [
        {"params": found[scale, decays], "lr_scale": scale, "weight_decay": config.weight_decay * decays}
        for scale, decays in sorted(found, reverse=True)
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    cls = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return cls(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the step size of the next step; groups that do not name their part of it have all of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The outer step size of meta-step ``step`` (0-based) of ``num_steps``: no state, so resume cannot change it."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        first = 0 if config.step_from == "start" else config.warmup_steps
        return config.lr * config.step_factor ** ((step - first) // config.step_every)
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.final_lr_factor + (1 - config.final_lr_factor) * left)
