"""The outer optimizer (torch's own, with weight-decay groups), and its step size as a function of the step."""

from __future__ import annotations

import math

import torch

from cml_dist.config.schema import OptimConfig
from cml_dist.meta.model import MetaModel
from cml_dist.meta.rule import part_of
from cml_dist.types import RULE


def build_optimizer(config: OptimConfig, model: MetaModel) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW on all meta-parameters.

    Weight decay is for the network's weights of two and more dimensions; never for what a rule learns.
    """
    decays = [p.ndim >= 2 and part_of(n) != RULE for n, p in zip(model.names, model.values, strict=True)]
    pairs = list(zip(model.values, decays, strict=True))
    groups = [
        {"params": [p for p, decayed in pairs if decayed], "weight_decay": config.weight_decay},
        {"params": [p for p, decayed in pairs if not decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    cls = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return cls(groups, lr=config.lr, betas=config.betas, eps=config.eps)


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
