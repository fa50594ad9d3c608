"""The DeepSpeed dictionary of a run: generated here and nowhere else. No torch, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cml_dist.config.launcher import DeepSpeedRequest, deepspeed_request
from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError

TUNING = {
    "": (
        "comms_logger", "disable_allgather", "dump_state", "flops_profiler", "log_level", "memory_breakdown",
        "steps_per_print", "wall_clock_breakdown",
    ),
    "zero_optimization": (
        "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "ignore_unused_parameters",
        "log_trace_cache_warnings", "overlap_comm", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients",
        "stage3_gather_16bit_weights_on_model_save", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "sub_group_size",
        "use_multi_rank_bucket_allreduce",
    ),
    "zero_optimization.offload_optimizer": ("buffer_count", "fast_init", "pin_memory"),
    "zero_optimization.offload_param": ("buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
}  # fmt: skip
"""Settings of a user's file that are taken over, by section: none changes what is computed, but for rounding."""

BUCKET_ELEMENTS = 50_000_000
"""Elements that are reduced or gathered at a time. DeepSpeed allocates a whole bucket (0.2 GB), whatever the model has;
its own default takes 2 GB. A larger parameter is reduced by itself."""


def deepspeed_config(config: RunConfig, plan: RunPlan, environment: Mapping[str, str]) -> dict[str, Any]:
    """The dictionary that DeepSpeed gets for a run with a strategy of ``zero0`` to ``zero3``.

    One forward, one backward and one reduction a meta-step, whatever the number of episodes: a batch of one a process,
    and no accumulation. The optimizer, its schedule and its precision are the run's own; DeepSpeed only partitions.

    Args:
        environment: the launcher's, which may name a DeepSpeed file.

    Raises:
        ConfigError: the plan's strategy is none of DeepSpeed's, or the user's file contradicts the run.
    """
    stage = zero_stage(plan.strategy)
    if stage is None:
        raise ConfigError(
            f"the strategy is {plan.strategy}, which does without DeepSpeed", "set parallel.strategy=zero2 (or 0, 1, 3)"
        )
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": False}
    if stage in (1, 2):
        # Each part of the gradient goes to the one rank that owns it. DeepSpeed's default sends all of it to all.
        zero |= {"reduce_scatter": True, "use_multi_rank_bucket_allreduce": False}
    if stage > 0:
        zero |= {"reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS}
    if stage == 3:
        zero["reduce_scatter"] = True
        zero["stage3_gather_16bit_weights_on_model_save"] = False  # checkpoints gather tensor by tensor instead
        # A meta-step needs all parameters from its start to its end. So they are all shared out (small ones would stay
        # whole, and be gathered one by one), gathered at once, and kept from the forward to the backward.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 10**12}
        zero["stage3_max_reuse_distance"] = 10**12
    pinned = {"device": "cpu", "pin_memory": config.run.device != "cpu"}
    if plan.offload in ("optimizer", "all"):
        zero["offload_optimizer"] = dict(pinned)
    if plan.offload == "all":
        zero["offload_param"] = dict(pinned)
    made = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": plan.processes,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        # torch's own optimizer steps on the partitions, also on those that lie on the CPU: the one that was asked for.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "zero_optimization": zero,
    }
    request = deepspeed_request(config, environment)
    if request is not None and request.settings:
        _merge(made, request.settings, request)
    return made


def zero_stage(strategy: str) -> int | None:
    """3 for ``zero3``; None for a strategy without DeepSpeed."""
    return int(strategy[-1]) if strategy.startswith("zero") else None


def _merge(made: dict[str, Any], theirs: Mapping[str, Any], request: DeepSpeedRequest, section: str = "") -> None:
    """Take over what only tunes; refuse what differs from ``made``, and what is not known."""
    for key, value in theirs.items():
        name = f"{section}.{key}" if section else key
        if key in TUNING.get(section, ()):
            if value != "auto":
                made[key] = value
        elif name in TUNING and isinstance(value, Mapping):
            ours = made.get(key)
            if ours is None:  # an offload section that says "none"
                continue
            _merge(ours, value, request, name)
        elif key in made and isinstance(made[key], dict) and isinstance(value, Mapping):
            _merge(made[key], value, request, name)
        elif key in made and (value == "auto" or value == made[key] or (not value and not made[key])):
            continue
        else:
            _refuse(name, value, made.get(key), request)


def _refuse(name: str, value: Any, ours: Any, request: DeepSpeedRequest) -> None:
    settings = {
        "gradient_clipping": "optim.clip_norm",
        "optimizer": "the section optim",
        "scheduler": "optim.schedule",
        "zero_optimization.stage": "parallel.strategy",
        "train_batch_size": "train.episodes_per_step",
        "fp16.enabled": "run.precision",
        "bf16.enabled": "run.precision",
    }
    shown = "{...}" if isinstance(value, Mapping) else repr(value)
    if name == "zero_force_ds_cpu_optimizer":
        why = "which would put DeepSpeed's Adam in the place of the optimizer that optim.name asks for"
    elif ours is not None:
        why = f"which contradicts the run (it has {ours!r})"
    elif name in settings:
        why = "which the run's own configuration decides"
    else:
        why = "which is not known here"
    remedy = f"remove it, and use {settings[name]}" if name in settings else "remove it"
    raise ConfigError(f"{request.source} sets {name} to {shown}, {why}", remedy)
