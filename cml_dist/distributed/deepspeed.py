"""DeepSpeed: its dictionary, generated here and nowhere else, and how it is started. No torch before that."""

from __future__ import annotations

import importlib.util
import logging
import os
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cml_dist.config.launcher import deepspeed_request
from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError, WorldError

if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin

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
        # A meta-step needs all parameters from its start to its end. So they are all shared out (small ones would stay
        # whole, and be gathered one by one), gathered at once, and kept from the forward to the backward.
        zero |= {
            "reduce_scatter": True,
            "stage3_gather_16bit_weights_on_model_save": False,  # checkpoints gather tensor by tensor instead
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 10**12,
            "stage3_max_reuse_distance": 10**12,
        }
    for section in {"optimizer": ("optimizer",), "all": ("optimizer", "param")}.get(plan.offload, ()):
        zero[f"offload_{section}"] = {"device": "cpu", "pin_memory": config.run.device != "cpu"}
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
    if request is not None:
        _merge(made, request.settings, request.source)
    return made


def zero_stage(strategy: str) -> int | None:
    """3 for ``zero3``; None for a strategy without DeepSpeed."""
    return int(strategy[-1]) if strategy.startswith("zero") else None


@contextmanager
def deepspeed_plugin(dictionary: dict[str, Any], use_cpu: bool) -> Iterator[DeepSpeedPlugin]:
    """Accelerate's plugin with our dictionary; meanwhile the environment says what both learn from it alone.

    Afterwards Accelerate's variables are the launcher's again: the plan is read from them.

    Raises:
        WorldError: DeepSpeed is not installed.
    """
    for package in ("deepspeed", "transformers"):  # Accelerate's plugin imports the latter, whatever the model
        if importlib.util.find_spec(package) is None:
            raise WorldError(
                f"parallel.strategy is one of DeepSpeed's, but {package} is not installed",
                "pip install 'cml-dist[deepspeed]', or set parallel.strategy=ddp",
            )
    from accelerate.utils import DeepSpeedPlugin, patch_environment

    os.environ["DS_ACCELERATOR"] = "cpu" if use_cpu else "cuda"
    if os.environ.get("LOCAL_RANK") is None:  # DeepSpeed asks for a launcher's words, although our group is there
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # where nobody listens, nor asks
    import_deepspeed()
    words = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_CONFIG_DS_FIELDS": "",  # of the Accelerate file, which our dictionary already answers
        "ACCELERATE_USE_CPU": "false",  # would leave DeepSpeed out, silently
    }
    if use_cpu:
        words["ACCELERATE_TORCH_DEVICE"] = "cpu"  # also on a machine that has GPUs
    with patch_environment(**words):
        yield DeepSpeedPlugin(
            hf_ds_config=dictionary,
            gradient_accumulation_steps=1,
            gradient_clipping=dictionary["gradient_clipping"],
            zero_stage=dictionary["zero_optimization"]["stage"],
            zero3_init_flag=False,  # the network is built whole on every rank, and then shared out
        )


def import_deepspeed() -> None:
    """Import DeepSpeed so that it compiles nothing and says nothing but errors.

    Its communication layer builds a C++ operator on CPUs when it starts, for minutes, which serves inference alone;
    and its CPU optimizers, which would be built for offload, do not run here. With no operator counted as compatible
    it does without. There is nothing to build, ahead or in between, and no lock to wait for.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        import deepspeed
    # Newer torch has other names for two collectives that DeepSpeed calls.
    calls = "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=calls, category=FutureWarning)
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.ERROR)


def _merge(made: dict[str, Any], theirs: Mapping[str, Any], source: str, section: str = "") -> None:
    """Take over what only tunes; refuse what differs from ``made``, and what is not known."""
    for key, value in theirs.items():
        name, ours = f"{section}.{key}" if section else key, made.get(key)
        if key in TUNING.get(section, ()):
            if value != "auto":
                made[key] = value
        elif isinstance(value, Mapping) and name in (*TUNING, "fp16", "bf16"):
            if ours is not None:  # else an offload section that says "none"
                _merge(ours, value, source, name)
        elif key not in made or (value not in ("auto", ours) and (value or ours)):
            why = f"contradicts the run (it has {ours!r})" if key in made else "is not taken over here"
            decides = DECIDED_BY.get(name)
            raise ConfigError(
                f"{source} sets {name} to {reprlib.repr(value)}, which {why}",
                f"remove it; {decides} decides it here" if decides else "remove it",
            )
