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
ACCELERATE_FILE = "the launcher's Accelerate file"
IN_A_DEEPSPEED_FILE = {"zero_stage", "offload_optimizer_device", "offload_param_device", "gradient_clipping"}
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
        ConfigError: a file that cannot be read, two different ones, or what does not exist here.
    """
    file, given = config.parallel.deepspeed, None
    launched = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if launched:
        _check_accelerate(config, environment)
        given = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        given = None if given in NOT_SAID else given
    if file is not None and given is not None and Path(file).resolve() != Path(given).resolve():
        raise ConfigError(
            f"parallel.deepspeed is {file}, but the launcher hands over {given}",
            "name one of the two: drop parallel.deepspeed, or deepspeed_config_file from the Accelerate file",
        )
    beside = IN_A_DEEPSPEED_FILE & set(environment.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(","))
    if given is not None and beside:
        raise ConfigError(
            f"{ACCELERATE_FILE} names {given} and sets {min(beside)} beside it", "say it in the DeepSpeed file alone"
        )
    file = given if file is None else file
    if file is not None:
        settings = _read_deepspeed_file(file)
        zero = settings["zero_optimization"]
        return DeepSpeedRequest(file, zero["stage"], _offload(file, zero), settings)
    if not launched:
        return None
    said = {
        section: {"device": environment.get(f"ACCELERATE_DEEPSPEED_{section.upper()}_DEVICE", "none")}
        for section in ("offload_optimizer", "offload_param")
    }
    stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    return DeepSpeedRequest(ACCELERATE_FILE, stage, _offload(ACCELERATE_FILE, said))


def _read_deepspeed_file(path: str) -> dict[str, Any]:
    """The dictionary of a DeepSpeed file, which names its ZeRO stage."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the DeepSpeed file {path} cannot be read: {why}", "mend it, or parallel.deepspeed or the launcher's file"
        ) from error
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"the DeepSpeed file {path} has no zero_optimization.stage of 0, 1, 2 or 3 (it is {stage!r})",
            'add "zero_optimization": {"stage": 2}, or what is wanted',
        )
    return settings


def _offload(source: str, zero: Mapping[str, Any]) -> str:
    """Two sections -> ``none``, ``optimizer`` or ``all``."""
    devices = []
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name) or {}
        device = str(section.get("device", "none")).lower() if isinstance(section, Mapping) else repr(section)
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"{source} sets {name} to {device}, which is not supported here",
                'set its device to cpu or none (in a DeepSpeed file {"device": "cpu"})',
            )
        devices.append(device)
    if devices == ["none", "cpu"]:
        raise ConfigError(
            f"{source} offloads the parameters without the optimizer",
            "offload the optimizer to the CPU too, or neither",
        )
    return ("none", "optimizer", "all")[devices.count("cpu")]


def _check_accelerate(config: RunConfig, environment: Mapping[str, str]) -> None:
    """Refuse what an Accelerate file asks for beside stage and offload, and what the run does otherwise.

    What concerns models of transformers passes (``zero3_init_flag``, ``zero3_save_16bit_model``, classes of experts):
    the network is built on every rank, and checkpoints and exports gather the parameters themselves.
    """
    for name, ours, setting in (
        ("gradient_clipping", config.optim.clip_norm or 0.0, "optim.clip_norm"),
        ("gradient_accumulation_steps", 1, "train.episodes_per_step"),
        ("mixed_precision", "no", "run.precision"),
    ):
        asked = environment.get(f"ACCELERATE_{name.upper()}", "auto").lower()
        if asked not in NOT_SAID and type(ours)(asked) != ours:
            raise ConfigError(
                f"{ACCELERATE_FILE} sets {name} to {asked}, but the run has {ours}",
                f"drop it there; {setting} decides it here",
            )
