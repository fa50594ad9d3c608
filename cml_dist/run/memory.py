"""Chooses engine, micro-batch and place of the copies, so that a run stays inside its memory budget."""

from __future__ import annotations

from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError
from cml_dist.nets.guard import couples_examples
from cml_dist.nets.network import CmlNet


def fit_memory(config: RunConfig, plan: RunPlan, net: CmlNet) -> RunPlan:
    if plan.micro_batch is not None and couples_examples(net):
        raise ConfigError(
            f"engine.micro_batch is {plan.micro_batch}, but model.backbone {config.model.backbone} couples examples "
            "of a batch by BatchNorm's batch statistics: parts of a batch would have others",
            "set engine.micro_batch=auto, or model.norm=frozen with pre-trained weights, or choose a backbone with "
            "LayerNorm or GroupNorm",
        )
    return plan
