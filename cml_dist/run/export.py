"""Export: psi and theta only, as safetensors with a small JSON and a model card; phi is deleted (paper, section 3)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from cml_dist import __version__
from cml_dist.atomic import write_json, write_text
from cml_dist.config.methods import is_classifier, method_title, warp_settings
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.allocator import memory_explained
from cml_dist.distributed.world import joined_world
from cml_dist.errors import CheckpointError, CmlError, ConfigError, ModelError
from cml_dist.meta.rule import LEARNED_RATES, part_of
from cml_dist.methods.build import describe_rule
from cml_dist.nets.guard import has_batch_norm
from cml_dist.registry import TIMM, backbone_entry
from cml_dist.run.assemble import Parts, assemble
from cml_dist.run.card import UNKNOWN, model_card, tested_figure
from cml_dist.run.checkpoint import choose
from cml_dist.run.folder import DESCRIPTION, REST, WEIGHTS, RunFolder
from cml_dist.run.report import overrides_of
from cml_dist.run.safetensors_stream import read_exported, save_tensors
from cml_dist.telemetry.console import Console
from cml_dist.telemetry.metrics import read_metrics
from cml_dist.types import COLEARNER, INTERPOLATIONS, Batch, Episode, Params

CARD = "README.md"
TIMM_CONFIG, ONNX = "config.json", "model.onnx"
OUTDATED = ("timm.safetensors", REST, ONNX)
"""Files of an earlier export to the same folder, which may not stay beside this one."""

MOST_DESCRIPTION = 2**24
"""Bytes of ``model.json``: whoever made it may have written anything."""

FORMAT = 3
"""1 and 2 are read too. Since 3 a timm backbone lies in ``model.safetensors`` under timm's own names, and what else the
learner has in ``learner.safetensors``. Format 1 has the rates of plain SGD and what adapts, and no ``rule``."""


@dataclass(frozen=True)
class Wanted:
    """What an export is to be.

    Attributes:
        which: the checkpoint: best, last, or a step.
        to: the folder; None: that of the run.
        onnx: whether to write an ONNX file too.
        license: of the weights, for the card, e.g. ``apache-2.0``.
    """

    which: str = "best"
    to: str | None = None
    onnx: bool = False
    license: str = UNKNOWN


def export_again(config: RunConfig, wanted: Wanted, console: Console) -> None:
    """Export a run's checkpoint by its configuration. Collective: all ranks (rank 0 writes)."""
    with joined_world(config) as world, memory_explained(world.device):
        parts = assemble(config, world, console, training=False)
        world.heartbeat.beat("the export")
        world.run_on_main(lambda: export_run(config, parts, console, wanted))


def export_run(config: RunConfig, parts: Parts, console: Console, wanted: Wanted) -> None:
    """Write the learner of a run's checkpoint to a folder, and say so.

    Raises:
        CheckpointError: there is no such checkpoint. CmlError: the folder cannot be written. ModelError: the ONNX file
            would answer otherwise than torch.
    """
    if is_classifier(config):
        raise ConfigError(
            f"{config.run.dir} is a classifier of its training classes, and no learner to be exported",
            f"start a run from it: cml-dist train CONFIG model.init_from={config.run.dir}",
        )
    folder, net = RunFolder(config.run.dir), parts.net
    target = folder.export if wanted.to is None else Path(wanted.to)
    checkpoint, _ = choose(folder.checkpoints, wanted.which, net, console.warn)
    params = checkpoint.params([n for n, _ in net.named_parameters() if part_of(n) != COLEARNER])
    # Constants too: with frozen statistics the network is not whole without them.
    rule = parts.model.method.rule
    constants = {n: b for n, b in net.named_buffers() if part_of(n) != COLEARNER and n not in rule.replaces}
    whole = {**params, **constants}
    # Plain timm knows no warp layers.
    plain, is_timm = rule.network(whole, 0), backbone_entry(config.model.backbone) is TIMM and not config.method.warp
    by_batch = has_batch_norm(net) and config.model.norm == "batch"
    running: Params = {}
    if by_batch and (is_timm or wanted.onnx):
        running = _running_statistics(parts, plain, None if wanted.onnx else console)
    files, timm_config = {WEIGHTS: whole}, {"architecture": config.model.backbone}
    if is_timm:
        files, timm_config = _timm_files(config, parts, whole, plain, running)
    # What does not adapt by the method, or is frozen, does not adapt in use either.
    adapts = sorted(n for n in rule.rates(net.adaptable()) if part_of(n) != COLEARNER)
    description = {
        "format": FORMAT,
        "cml_dist": __version__,
        "backbone": config.model.backbone,
        "timm": {"num_classes": timm_config["num_classes"], **timm_config["model_args"]} if is_timm else None,
        "input_shape": list(parts.domain.input_shape),
        "output_dim": parts.domain.output_dim,
        "score": parts.domain.score_name,
        "preprocessing": parts.domain.preprocessing(),
        "inner_steps": parts.plan.test_inner_steps,
        "method": method_title(config),
        "unlabelled": asdict(how) if (how := parts.model.method.unlabelled) else None,
        "rule": describe_rule(rule, config.method.name, adapts),
        "model": config.model.model_dump(mode="json"),
        "warp": warp_settings(config.method),
        "step": checkpoint.step,
        "trained_on": config.domain.model_dump(mode="json"),
        "image_set": parts.domain.describe().get("name"),
        "eval": _tested(folder, checkpoint.step, overrides_of(config, parts, checkpoint)),
    }
    learned = [value.flatten() for name, value in params.items() if name.startswith(LEARNED_RATES)]
    card = model_card(
        config,
        description,
        learned=torch.cat(learned) if learned else None,
        parameters=sum(p.numel() for p in params.values()),
        classes=parts.domain.class_names("train"),
        chance=parts.domain.chance,
        curve=read_metrics(folder.validation_file),
        license=wanted.license,
        onnx=wanted.onnx,
        by_batch=by_batch,
        running=bool(running),
        has_rows=bool(rule.replaces),
        is_registered=is_timm and not net.body.model.__module__.startswith("cml_dist."),
    )
    if wanted.onnx:
        _write_onnx(target / ONNX, description, {**plain, **running}, not net.starts_head)
    for name, tensors in files.items():
        save_tensors(target / name, tensors)
    for name in {*OUTDATED} - files.keys() - ({ONNX} if wanted.onnx else set()):
        (target / name).unlink(missing_ok=True)
    write_text(target / CARD, card)
    write_json(target / TIMM_CONFIG, timm_config)
    write_json(target / DESCRIPTION, description)
    console.note(f"Exported model: {target}{' (its ONNX file answers as torch does)' if wanted.onnx else ''}")


def _running_statistics(parts: Parts, values: Params, console: Console | None) -> Params:
    """Of norms by batch statistics, as buffers by name: those of all images of the first training episode.

    Meta-training keeps none, and a plain network that answers image by image needs some. With a console it says where
    the training set is not at hand, and there are none.
    """
    domain = parts.domain
    try:
        domain.check_splits(["train"])
        episode = domain.prepare(domain.episode("train", 0), torch.device("cpu"), parts.dtype)
    except CmlError as error:
        if console is None:
            raise
        console.warn(f"Norms are exported without running statistics: {error.what}; name the training set to have them")
        return {}
    inputs = torch.cat([batch.inputs for batch in episode.batches])
    every = Batch(inputs, inputs)
    return parts.model.problem.seen_of(values, Episode(every, every, "train", 0), ("pooled",), "support").norms


def _timm_files(
    config: RunConfig, parts: Parts, whole: Params, plain: Params, running: Params
) -> tuple[dict[str, Params], dict[str, Any]]:
    """The files of a learner with a timm backbone, and timm's configuration.

    Args:
        whole: all that the learner has.
        plain: the network before any adaptation.
    """
    from cml_dist.nets.timm_backbone import PREFIX, hub_config, timm_export

    is_linear = config.model.head == "linear"  # one that each episode starts is no classifier by itself
    try:
        state, kwargs = timm_export(parts.net, plain, with_head=is_linear)
    except ModelError:  # a few of timm's models have a classifier that a linear head does not fit
        state, kwargs = timm_export(parts.net, plain, with_head=(is_linear := False))
    own = {f"{PREFIX}{name}": value for name, value in state.items()}
    rest = {n: value for n, value in whole.items() if n not in own or not torch.equal(own[n], value)}
    state |= {n.removeprefix(PREFIX): value for n, value in running.items()}
    classes = parts.domain.output_dim if is_linear else 0
    return {WEIGHTS: state, REST: rest}, hub_config(parts.net.body, classes, kwargs, parts.domain.preprocessing())


def _write_onnx(path: Path, description: dict[str, Any], values: Params, has_head: bool) -> None:
    """What the learner is before any adaptation, as an ONNX file."""
    from cml_dist.run.onnx_file import write_onnx

    passes = ("pooled", "meta") if has_head else ("pooled",)
    outputs = {"features": "float32 [N, D], what the head reads"}
    if has_head:
        outputs["outputs"] = "float32, of the head before any adaptation"
    write_onnx(path, description, values, lambda net, inputs: net(inputs, passes), outputs)


def _tested(folder: RunFolder, step: int, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """The run's own figures; None where they are of another step or task, which would be a lie."""
    try:
        tested = folder.own_test()
        if tested is None or tested["step"] != step or tested.get("overrides") or overrides:
            return None
        tested_figure(tested)
        return {key: tested[key] for key in ("meta", "split", "score")}
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = f"the test in {folder.path} is damaged ({type(error).__name__}: {str(error)[:200]})"
        raise CheckpointError(what, "test the run again: cml-dist eval RUN_DIR") from error


Side = Annotated[int, Field(ge=1, le=2**16)]


class _Scaling(BaseModel):
    """How pictures come to the input's size, where they do not have it."""

    packed_size: tuple[Side, Side]
    interpolation: Literal[INTERPOLATIONS]


class _Unlabelled(BaseModel, extra="forbid"):
    """How a learner adapts on unlabelled examples."""

    steps: int = Field(ge=1, le=1000)
    weight: float = Field(allow_inf_nan=False)
    temperature: float = Field(gt=0)
    refinement: float = Field(ge=0, allow_inf_nan=False)


class _Description(BaseModel):
    """What is read of ``model.json``, which may hold more: whoever made it may have written anything."""

    input_shape: list[Side] = Field(min_length=1, max_length=8)
    output_dim: int = Field(ge=1, le=2**16)
    score: str
    inner_steps: int = Field(ge=0, le=1000)
    preprocessing: dict[str, Any]
    model: dict[str, Any]
    trained_on: dict[str, Any] | None = None
    rule: dict[str, Any] | None = None
    unlabelled: _Unlabelled | None = None

    @model_validator(mode="after")
    def _agrees(self) -> _Description:
        for name in {"mean", "std"} & self.preprocessing.keys():
            values = np.array(self.preprocessing[name], dtype=np.float64)
            usable = np.isfinite(values).all() and (name == "mean" or (values > 0).all())
            if values.shape != (self.input_shape[0],) or not usable:
                raise ValueError(f"preprocessing.{name} does not fit the input")
        if "packed_size" in self.preprocessing:
            _Scaling.model_validate(self.preprocessing, strict=False)
        return self


def read_description(folder: Path) -> dict[str, Any]:
    """The JSON of an exported model; CheckpointError where none is there."""
    try:
        file = folder / DESCRIPTION
        if file.exists() and (not file.is_file() or file.stat().st_size > MOST_DESCRIPTION):
            raise ValueError(f"{DESCRIPTION} is no file of at most {MOST_DESCRIPTION:,} bytes")
        description = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_model(folder, error) from error
    check_description(description, folder)
    return description


def check_description(description: Any, where: Path) -> None:
    """CheckpointError where it is not what an export says of itself, in a format that is read here."""
    try:
        _Description.model_validate(description, strict=True)
    except (ValueError, RecursionError) as error:
        raise _no_model(where, error) from error
    if description.get("format") not in range(1, FORMAT + 1):
        what = f"{where} has export format {description.get('format')}, this version reads {FORMAT}"
        raise CheckpointError(what, "update cml_dist")


def _no_model(where: Path, error: Exception) -> CheckpointError:
    remedy = "give a run folder, or what cml-dist export RUN_DIR wrote"
    return CheckpointError(f"{where} holds no exported model ({error})", remedy)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """psi, theta and constants of an exported model by canonical name, on the CPU; floating ones in float32.

    Of a timm backbone there may be more: a classifier, and running statistics.
    """
    try:
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"no file {WEIGHTS}")
        return {n: t.float() if t.is_floating_point() else t for n, t in read_exported(folder).items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is missing or damaged ({error})", "export the run again") from error
