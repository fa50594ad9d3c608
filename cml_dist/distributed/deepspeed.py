"""DeepSpeed: what it gets, and how it is started. No torch before that."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cml_dist.config.deepspeed import generated, merge
from cml_dist.config.launcher import deepspeed_request, refuse
from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError, WorldError

if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin


def deepspeed_config(config: RunConfig, plan: RunPlan, environment: Mapping[str, str]) -> dict[str, Any]:
    """The dictionary that DeepSpeed gets for a run with a strategy of ``zero0`` to ``zero3``.

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
    made, request = generated(config, stage, plan.offload, plan.processes), deepspeed_request(config, environment)
    if request is not None:
        refuse(merge(made, request, config))
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
                f"pip install {package} (it exists for Linux), or set parallel.strategy=ddp",
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
