"""What a launcher and a user's launch files ask of the run: honoured, or refused by name, all at once. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cml_dist.errors import ConfigError, SettingsError

RunConfig = Any  # schema.RunConfig, which takes its time to import: every command reads names from here

Finding = tuple[str, str]
"""(what is wrong, what to do)"""

NOT_SAID = ("", "auto", "none")
LAUNCH_FILE = "CML_DIST_LAUNCH_FILE"
"""Where the environment names the launcher's Accelerate file."""

IN_A_DEEPSPEED_FILE = {"zero_stage", "offload_optimizer_device", "offload_param_device", "gradient_clipping"}
"""What an Accelerate file cannot say where it names a DeepSpeed file."""

USE = "ACCELERATE_USE_"
HONOURED = ("DEEPSPEED", "CPU", "PARALLELISM_CONFIG")
"""Of what Accelerate calls ``ACCELERATE_USE_...``: the run heeds it, or looks at the settings that it switches on."""

TYPES = {"NO": None, "FALSE": None, "MULTI_GPU": None, "TPU": "XLA"}
"""``distributed_type`` of an Accelerate file -> what is then used, where it is not of the same name. YAML takes an
unquoted NO for false."""


@dataclass(frozen=True)
class DeepSpeedRequest:
    """DeepSpeed as a user's file asks for it.

    Attributes:
        source: the file, for people.
        stage: of ZeRO.
        offload: ``none``, ``optimizer`` or ``all``.
        settings: the user's DeepSpeed dictionary; empty where an Accelerate file names stage and offload alone.
        findings: what it asks of offloading that does not exist here.
    """

    source: str
    stage: int
    offload: str
    settings: dict[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def refuse(findings: Sequence[Finding]) -> None:
    """Raise one error for all findings, if there are any."""
    if len(findings) == 1:
        raise ConfigError(*findings[0])
    if findings:
        listed = "; ".join(f"({n}) {what}: {remedy}" for n, (what, remedy) in enumerate(findings, start=1))
        raise SettingsError(f"{len(findings)} settings contradict the run: {listed}")


def launcher_variables(path: str | Path) -> dict[str, str]:
    """The environment that ``accelerate launch`` makes of an Accelerate file, to look at before anything starts.

    Raises:
        ConfigError: the file cannot be read.
    """
    import yaml

    unusable, remedy = f"the Accelerate file {path} cannot be used", "start from a file of cml-dist launch files DIR"
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML too
        kind = str(data["distributed_type"]).upper()
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or "it is no mapping with a distributed_type"
        raise ConfigError(f"{unusable}: {why}", remedy) from error
    sections = {name: data.get(name) or {} for name in ("deepspeed_config", "dynamo_config", "parallelism_config")}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{unusable}: its {name} is no section", remedy)
    deepspeed = sections["deepspeed_config"] if kind == "DEEPSPEED" else {}
    said = {
        "MIXED_PRECISION": data.get("mixed_precision"),
        "DYNAMO_BACKEND": sections["dynamo_config"].get("dynamo_backend", data.get("dynamo_backend")),
        "USE_CPU": data.get("use_cpu", False),
        "USE_SAGEMAKER": data.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE",
        "CONFIG_DS_FIELDS": ",".join(deepspeed),
    }
    if used := TYPES.get(kind, kind):
        said[f"USE_{used}"] = True
    for name, value in deepspeed.items():
        short = name.startswith(("gradient_", "deepspeed_"))
        said[name.upper() if short else f"DEEPSPEED_{name.upper()}"] = value
    for name, value in sections["parallelism_config"].items():
        said["USE_PARALLELISM_CONFIG"] = True
        said[name.upper()] = value
    # YAML takes an unquoted no for false.
    words = {name: "no" if value is False else str(value) for name, value in said.items() if value is not None}
    found = {name if name.startswith("PARALLELISM_") else f"ACCELERATE_{name}": word for name, word in words.items()}
    return {**found, LAUNCH_FILE: str(path)}


def launcher_findings(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What an Accelerate file asks for that the run does not do, or does otherwise; stage and offload aside.

    What concerns models of transformers passes (``zero3_init_flag``, ``zero3_save_16bit_model``, classes of experts):
    the network is built on every rank, and checkpoints and exports gather the parameters themselves. Where no launcher
    has started this process, something else has left Accelerate's variables behind, and they say nothing.
    """
    if not any(name.startswith(USE) or name == "TORCHELASTIC_RUN_ID" for name in environment):
        return
    source = _accelerate_file(environment)
    for name, value in sorted(environment.items()):
        used = name.removeprefix(USE)
        if used != name and used not in HONOURED and _is_true(value):
            yield (
                f"{source} asks for {used} ({name}), which does not exist here",
                "set its distributed_type to MULTI_GPU or DEEPSPEED, as in the files of cml-dist launch files DIR",
            )
        elif name.startswith("PARALLELISM_CONFIG_") and name.endswith("_SIZE") and value not in ("", "1"):
            if _is_true(environment.get(f"{USE}PARALLELISM_CONFIG", "")):
                yield f"{source} sets {name.lower()} to {value}, which does not exist here", "drop it there"
    # A notebook's launcher, which sets NPROC, has another name for it, which nothing else reads.
    by_notebook = environment.get("MIXED_PRECISION", "no") if "NPROC" in environment else "no"
    precision, asked = config.run.precision, environment.get("ACCELERATE_MIXED_PRECISION", by_notebook).lower()
    if asked not in (*NOT_SAID, "no", precision):
        yield (
            f"{source} sets mixed_precision to {asked}, but run.precision is {precision}",
            "set run.precision=bf16, or mixed_precision to no there",
        )
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND")
    if dynamo is None and LAUNCH_FILE in environment:  # with DeepSpeed, accelerate launch does not hand it on
        with suppress(ConfigError):
            dynamo = launcher_variables(environment[LAUNCH_FILE]).get("ACCELERATE_DYNAMO_BACKEND")
    if (dynamo or "no").lower() not in (*NOT_SAID, "no"):
        what = f"{source} sets dynamo_backend to {dynamo}, but nothing is compiled here"
        yield what, "drop its dynamo_config: compiled code has no second derivative"
    if _is_true(environment.get(f"{USE}CPU", "")) and config.run.device == "cuda":
        yield f"{source} sets use_cpu, but run.device is cuda", "set run.device=cpu, or drop use_cpu there"
    for name, ours, setting in (
        ("gradient_clipping", config.optim.clip_norm or 0.0, "optim.clip_norm"),
        ("gradient_accumulation_steps", 1, "train.episodes_per_step"),
    ):
        asked = environment.get(f"ACCELERATE_{name.upper()}", "auto").lower()
        if asked not in NOT_SAID and asked not in (str(ours), str(float(ours))) and not _equals(asked, ours):
            what = f"{source} sets {name} to {asked}, but the run has {ours}"
            yield what, f"drop it there; {setting} decides it here"


def deepspeed_request(config: RunConfig, environment: Mapping[str, str]) -> DeepSpeedRequest | None:
    """What ``parallel.deepspeed`` or the launcher asks of DeepSpeed; None where neither speaks of it.

    Raises:
        ConfigError: a file that cannot be read, two different ones, or what does not exist here.
    """
    file, given = config.parallel.deepspeed, None
    launched, source = _is_true(environment.get(f"{USE}DEEPSPEED", "")), _accelerate_file(environment)
    if launched:
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
            f"{source} names {given} and sets {' and '.join(sorted(beside))} beside it",
            "say it in the DeepSpeed file alone",
        )
    file = given if file is None else file
    if file is not None:
        settings = _read_deepspeed_file(file)
        zero = settings["zero_optimization"]
        offload, found = _offload(file, zero)
        return DeepSpeedRequest(file, zero["stage"], offload, settings, found)
    if not launched:
        return None
    said = {
        section: {"device": environment.get(f"ACCELERATE_DEEPSPEED_{section.upper()}_DEVICE", "none")}
        for section in ("offload_optimizer", "offload_param")
    }
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("0", "1", "2", "3"):
        raise ConfigError(f"{source} sets zero_stage to {stage}", "set it to 0, 1, 2 or 3")
    offload, found = _offload(source, said)
    return DeepSpeedRequest(source, int(stage), offload, findings=found)


def _accelerate_file(environment: Mapping[str, str]) -> str:
    return f"the launcher's Accelerate file {environment.get(LAUNCH_FILE, '')}".rstrip()


def _is_true(word: str) -> bool:
    return word.lower() in ("true", "yes", "1", "on")


def _equals(word: str, number: float) -> bool:
    try:
        return float(word) == number
    except ValueError:
        return False


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


def _offload(source: str, zero: Mapping[str, Any]) -> tuple[str, tuple[Finding, ...]]:
    """Two sections -> ``none``, ``optimizer`` or ``all``, and what does not exist here."""
    devices: list[str] = []
    found: list[Finding] = []
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name) or {}
        device = str(section.get("device", "none")).lower() if isinstance(section, Mapping) else repr(section)
        if device not in ("none", "cpu"):
            what = f"{source} sets {name} to {device}, which is not supported here"
            found.append((what, 'set its device to cpu or none (in a DeepSpeed file {"device": "cpu"})'))
        devices.append(device)
    if devices == ["none", "cpu"]:
        what = f"{source} offloads the parameters without the optimizer"
        found.append((what, "offload the optimizer to the CPU too, or neither"))
    return ("none", "optimizer", "all")[devices.count("cpu")], tuple(found)
