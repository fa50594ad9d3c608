"""DeepSpeed's dictionary: generated here and nowhere else, and what of a user's own file goes into it. No torch."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from cml_dist.config.launcher import DeepSpeedRequest, Finding
from cml_dist.config.schema import RunConfig

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

SECTIONS = (*TUNING, "fp16", "bf16")

DECIDED_BY = {
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "the section optim",
    "scheduler": "optim.schedule",
    "zero_force_ds_cpu_optimizer": "optim.name",
    "zero_optimization.stage": "parallel.strategy",
    "train_batch_size": "train.episodes_per_step",
    "fp16.enabled": "run.precision",
    "bf16.enabled": "run.precision",
}
"""Settings of a user's file that the run's own configuration has."""

BUCKET_ELEMENTS = 50_000_000
"""Elements that are reduced or gathered at a time. DeepSpeed allocates a whole bucket (0.2 GB), whatever the model has;
its own default takes 2 GB. A larger parameter is reduced by itself."""


def generated(config: RunConfig, stage: int, offload: str, processes: int) -> dict[str, Any]:
    """The dictionary for a ZeRO ``stage``, before a user's file is merged into it.

    One forward, one backward and one reduction a meta-step, whatever the number of episodes: a batch of one a process,
    and no accumulation. The optimizer, its schedule and its precision are the run's own; DeepSpeed only partitions.

    Args:
        offload: ``none``, ``optimizer`` or ``all``.
    """
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": False}
    if stage in (1, 2):
        # Each part of the gradient goes to the one rank that owns it. DeepSpeed's default sends all of it to all.
        zero |= {"reduce_scatter": True, "use_multi_rank_bucket_allreduce": False}
    if stage > 0:
        zero |= {"reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS}
    if stage == 3:
        # A meta-step needs all parameters from its start to its end. So they are all shared out (small ones would stay
        # whole, and be gathered one by one), gathered at once, and kept from the forward to the backward.
        zero |= {
            "reduce_scatter": True,
            "stage3_gather_16bit_weights_on_model_save": False,  # checkpoints gather tensor by tensor instead
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 10**12,
            "stage3_max_reuse_distance": 10**12,
        }
    for section in {"optimizer": ("optimizer",), "all": ("optimizer", "param")}.get(offload, ()):
        zero[f"offload_{section}"] = {"device": "cpu", "pin_memory": config.run.device != "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": processes,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        # torch's own optimizer steps on the partitions, also on those that lie on the CPU: the one that was asked for.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},  # run.precision=bf16 is autocast inside the network
        "zero_optimization": zero,
    }


def merge(made: dict[str, Any], request: DeepSpeedRequest, config: RunConfig) -> list[Finding]:
    """Take over into ``made`` what only tunes; returns all that differs from it, and all that is not known."""
    return list(_merge(made, request.settings, request.source, {"bf16.enabled": config.run.precision == "bf16"}))


def _merge(
    made: dict[str, Any], theirs: Mapping[str, Any], source: str, means: Mapping[str, Any], section: str = ""
) -> Iterator[Finding]:
    """``means``: what a setting may say besides, because the run does it in another way."""
    for key, value in theirs.items():
        name, ours = f"{section}.{key}" if section else key, made.get(key)
        if value is None:
            continue
        if key in TUNING.get(section, ()):
            if value != "auto":
                made[key] = value
        elif isinstance(value, Mapping) and value.get("enabled", name not in ("fp16", "bf16")) in (False, "auto"):
            continue  # switched off: what else the section has says nothing
        elif isinstance(value, Mapping) and name in SECTIONS:
            if ours is not None:  # else an offload section that says "none"
                yield from _merge(ours, value, source, means, name)
        elif value == means.get(name, "auto"):
            continue
        elif key not in made or (value != ours and (value or ours)):
            why = f"contradicts the run (it has {ours!r})" if key in made else "is not taken over here"
            decides = DECIDED_BY.get(name)
            yield (
                f"{source} sets {name} to {reprlib.repr(value)}, which {why}",
                f"remove it; {decides} decides it here" if decides else "remove it",
            )
