"""What a user's files and the launcher's environment ask of DeepSpeed. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cml_dist.config.schema import RunConfig
from cml_dist.errors import ConfigError

NOT_SAID = ("", "auto", "none")
IN_A_DEEPSPEED_FILE = ("zero_stage", "offload_optimizer_device", "offload_param_device", "gradient_clipping")
"""What an Accelerate file cannot say where it names a DeepSpeed file."""


@dataclass(frozen=True)
class DeepSpeedRequest:
    """DeepSpeed as a user's file asks for it.

    Attributes:
        source: the file, for people.
        stage: of ZeRO.
        offload: ``none``, ``optimizer`` or ``all``.
        settings: the user's DeepSpeed dictionary; empty where an Accelerate file names stage and offload alone.
    """

    source: str
    stage: int
    offload: str
    settings: dict[str, Any] = field(default_factory=dict)


def deepspeed_request(config: RunConfig, environment: Mapping[str, str]) -> DeepSpeedRequest | None:
    """What ``parallel.deepspeed`` or the launcher asks of DeepSpeed; None where neither speaks of it.

    Raises:
        ConfigError: a file that cannot be read, two different ones, or an offload that does not exist here.
    """
    launched = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    given = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") if launched else "none"
    own = config.parallel.deepspeed
    if own is not None and given not in NOT_SAID and Path(own).resolve() != Path(given).resolve():
        raise ConfigError(
            f"parallel.deepspeed is {own}, but the launcher hands over {given}",
            "name one of the two: drop parallel.deepspeed, or deepspeed_config_file from the Accelerate file",
        )
    source = "the launcher's Accelerate file"
    if launched:
        _check_accelerate(source, config, environment)
    if given not in NOT_SAID:
        beside = set(environment.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")) & set(IN_A_DEEPSPEED_FILE)
        if beside:
            raise ConfigError(
                f"{source} names {given} and sets {sorted(beside)[0]} beside it", "say it in the DeepSpeed file alone"
            )
    file = own if own is not None else given if given not in NOT_SAID else None
    if file is not None:
        settings = read_deepspeed_file(file)
        zero = settings["zero_optimization"]
        return DeepSpeedRequest(
            source=file,
            stage=zero["stage"],
            offload=_offload(
                file, zero["stage"], _device(zero, "offload_optimizer"), _device(zero, "offload_param")
            ),
            settings=settings,
        )
    if not launched:
        return None
    stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    optimizer = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none").lower()
    params = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none").lower()
    return DeepSpeedRequest(source, stage, _offload(source, stage, optimizer, params))


def read_deepspeed_file(path: str | Path) -> dict[str, Any]:
    """The dictionary of a DeepSpeed file, which names its ZeRO stage.

    Raises:
        ConfigError: missing, no JSON, or without ``zero_optimization.stage``.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the DeepSpeed file {path} cannot be read: {error.strerror}",
            "mend parallel.deepspeed or the launcher's file",
        ) from error
    except ValueError as error:
        raise ConfigError(f"the DeepSpeed file {path} is no JSON: {error}", "mend it") from error
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"the DeepSpeed file {path} has no zero_optimization.stage of 0, 1, 2 or 3 (it is {stage!r})",
            'add "zero_optimization": {"stage": 2}, or what is wanted',
        )
    return settings


def _device(zero: Mapping[str, Any], section: str) -> str:
    if not isinstance(zero.get(section), (Mapping, type(None))):
        raise ConfigError(
            f"the DeepSpeed file sets zero_optimization.{section} to {zero[section]!r}, but it is a section",
            f'write "{section}": {{"device": "cpu"}}',
        )
    return str((zero.get(section) or {}).get("device", "none")).lower()


def _offload(source: str, stage: int, optimizer: str, params: str) -> str:
    """Two devices -> ``none``, ``optimizer`` or ``all``."""
    for what, device in (("offload_optimizer", optimizer), ("offload_param", params)):
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"{source} sets {what} to {device}, which is not supported here", "set its device to cpu or none"
            )
    if params == "cpu" and optimizer != "cpu":
        raise ConfigError(
            f"{source} offloads the parameters without the optimizer",
            "offload the optimizer to the CPU too, or neither",
        )
    return "all" if params == "cpu" else "optimizer" if optimizer == "cpu" else "none"


def _check_accelerate(source: str, config: RunConfig, environment: Mapping[str, str]) -> None:
    """Refuse what an Accelerate file asks for beside stage and offload, and what the run does otherwise.

    ``zero3_init_flag`` and ``zero3_save_16bit_model`` concern models of transformers and pass: the network is built
    on every rank, and checkpoints and exports gather the parameters themselves.
    """
    ours = {  # variable -> (its name in the file, what the run does, where the run says so)
        "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", str(config.optim.clip_norm or 0.0), "optim.clip_norm"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "1", "train.episodes_per_step"),
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no", "run.precision"),
        "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": ("deepspeed_moe_layer_cls_names", "none", "model.backbone"),
    }
    for variable, (name, here, setting) in ours.items():
        asked = environment.get(variable, "auto").lower()
        if asked not in NOT_SAID and not _same(asked, here):
            raise ConfigError(
                f"{source} sets {name} to {asked}, but the run has {here}", f"drop it there; {setting} decides it here"
            )


def _same(one: str, two: str) -> bool:
    """Equal as numbers, or as words."""
    try:
        return float(one) == float(two)
    except ValueError:
        return one == two
