"""The start from an earlier run (``model.init_from``): what is read, what of it fits, and how the images then look.

What a run started from is kept in its own folder, in ``start/``: the other folder may be gone when it is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cml_dist.atomic import write_json
from cml_dist.config.schema import ImageSettings, RunConfig
from cml_dist.data.base import Domain, ModelInputs
from cml_dist.errors import CheckpointError, ConfigError
from cml_dist.meta.rule import LEARNED_RATES, part_of
from cml_dist.methods.lora import PREFIX, Lora
from cml_dist.methods.maml_pp import MamlPlusPlus
from cml_dist.nets.guard import has_batch_norm
from cml_dist.nets.network import CmlNet
from cml_dist.run.checkpoint import find
from cml_dist.run.folder import DESCRIPTION, WEIGHTS, RunFolder, steps_in
from cml_dist.run.safetensors_stream import read_exported, save_tensors
from cml_dist.telemetry.console import Console
from cml_dist.types import BODY, COLEARNER, HEAD, RULE, Params

Warn = Callable[[str], None]

TITLES = {BODY: "body", HEAD: "head", COLEARNER: "co-learner", RULE: "learned rates"}


@dataclass(frozen=True)
class Start:
    """Values to start from.

    Attributes:
        values: by canonical name, on the CPU; what a rule learned beside rates is put into the network's own.
        source: where they are from, in words; empty for the copy in the run's own folder.
        mean, std: of each channel, by which that run's images were normalised; None: not known.
        size: height and width of the images that its network read; empty: not known.
    """

    values: Params
    source: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: tuple[int, ...] = ()


def read_start(config: RunConfig, warn: Warn) -> Start | None:
    """What ``model.init_from`` names, or the copy of it in ``run.dir``; None where it names nothing.

    Raises:
        CheckpointError: nothing that can be started from is there.
    """
    if config.model.init_from is None:
        return None
    place, kept = Path(config.model.init_from), RunFolder(config.run.dir).start
    try:
        return _exported(kept, "") if (kept / WEIGHTS).is_file() else _read(place, warn)
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        what = f"model.init_from is {place}, which holds no parameters to start from"
        remedy = "give a run folder, an export, or what cml-dist pretrain wrote"
        raise CheckpointError(f"{what} ({getattr(error, 'strerror', None) or error})", remedy) from error


def _read(place: Path, warn: Warn) -> Start:
    run = RunFolder(place)
    run.check_contained()
    if not steps_in(run.checkpoints):
        exported = run.export if (run.export / WEIGHTS).is_file() else place
        return _exported(exported, f"{exported}")
    found, how = find(run.checkpoints, "best", warn)
    values = found.params()
    if found.state.get("constants") and (run.export / WEIGHTS).is_file():
        values = {**_exported(run.export, "").values, **values}  # frozen parameters are in no checkpoint
    return _start(values, f"{place}, its {how} checkpoint (step {found.step})", found.state.get("inputs") or {})


def _exported(folder: Path, source: str) -> Start:
    values = read_exported(folder)
    said = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    inputs = {"input_shape": said.get("input_shape", ()), **said["preprocessing"]}
    return _start(values, source, inputs)


def _start(values: Params, source: str, inputs: dict[str, object]) -> Start:
    read = ModelInputs.model_validate({"input_shape": (), **inputs, "output_dim": None})
    rates = {n: value for n, value in values.items() if n.startswith(LEARNED_RATES)}
    beside = tuple((n[len(PREFIX) : -2], 0, 0) for n in values if n.startswith(PREFIX) and n.endswith(".A"))
    network = MamlPlusPlus(0.0, 0.0).network(values, 0)  # the norms of the first step
    network = Lora(0.0, 0.0, beside=beside).network({**values, **network}, 0)
    return Start({**network, **rates}, source, read.mean, read.std, read.input_shape[1:])


def keep_start(config: RunConfig, net: CmlNet, inputs: ModelInputs) -> None:
    """Keep the values that a run starts with in its folder, where :func:`read_start` finds them from now on."""
    folder = RunFolder(config.run.dir).start
    write_json(folder / DESCRIPTION, {"preprocessing": inputs.model_dump(mode="json", include={"mean", "std"})})
    save_tensors(folder / WEIGHTS, net.own_values())


def normalise_as_before(config: RunConfig, domain: Domain, start: Start | None, console: Console) -> None:
    """Give the network images as it was given them, where ``domain.statistics`` says so."""
    if start is None or not isinstance(config.domain, ImageSettings):
        return
    shape = tuple(map(int, domain.input_shape))
    if start.source and len(start.size) == 2 and start.size != shape[1:]:
        ours, theirs = ("x".join(map(str, size[::-1])) for size in (shape[1:], start.size))
        remedy = f" (domain.size={start.size[0]} reads these so)" if start.size[0] == start.size[1] else ""
        console.warn(f"Images have {ours} px, and those of {start.source} had {theirs}{remedy}")
    if start.mean is None or config.domain.statistics == "set":
        return
    if len(start.mean) == shape[0]:  # colours for grey fit no body
        said = domain.adopt(ModelInputs(input_shape=shape, output_dim=None, mean=start.mean, std=start.std))
        if said is not None:
            console.note(said)


def check_start(config: RunConfig, net: CmlNet, start: Start | None, warn: Warn) -> dict[str, str] | None:
    """What was taken over, in words by part; warns where the body is not whole. None: nothing, or not now.

    Raises:
        ConfigError: nothing of the body fits, or frozen statistics are not there.
    """
    if start is None or not start.source:
        return None
    own, taken = net.own_values(), net.fitting(start.values)
    rows, body = {"from": start.source}, [n for n in own if part_of(n) == BODY]
    place, backbone = f"model.init_from is {config.model.init_from}", f"model.backbone {config.model.backbone}"
    for part, title in TITLES.items():
        names, there = ([n for n in found if part_of(n) == part] for found in (own, start.values))
        names = [n for n in names if part != RULE or n.startswith(LEARNED_RATES)]
        if names:
            left = [n for n in names if n not in taken]
            rows[title] = f"{len(names) - len(left)} of {len(names)} tensors" + (_why(left, own, start) if left else "")
        elif there:
            rows[title] = "none here"
    if not any(n in taken for n in body):
        raise ConfigError(
            f"{place}, but nothing of its body fits {backbone}{_why(body, own, start)}",
            "set model.* as in that run, or leave model.init_from out",
        )
    lacking = [n for n in body if n not in taken]
    has_statistics = any(n.endswith("running_mean") for n in taken)
    if config.model.norm == "frozen" and has_batch_norm(net.body) and not has_statistics:
        raise ConfigError(
            f"model.norm is frozen, but {place}, which has no statistics to freeze",
            "set model.norm=batch, or give an export, which has some",
        )
    if lacking:
        said = f"{len(lacking)} of {len(body)} tensors of the body are not taken over, and start as without it"
        frozen = "" if start.values.keys() & {*lacking} else "; of a run with frozen parameters give the export"
        warn(f"{place}: {said}{frozen}")
    return rows


def _why(left: list[str], own: Params, start: Start) -> str:
    """Why some tensors are not taken over: the first two of them."""
    if not any(part_of(n) == part_of(left[0]) for n in start.values):
        return ": none there"

    def size(values: Params, name: str) -> str:
        return "x".join(map(str, values[name].shape)) or "a number"

    first = left[:2]
    shown = [f"{n} is {size(start.values, n)} there, {size(own, n)} here" for n in first if n in start.values]
    shown += [f"{n} is not there" for n in first if n not in start.values]
    return f"; not taken: {', '.join(shown)}" + (f" and {more} more" if (more := len(left) - len(first)) else "")
