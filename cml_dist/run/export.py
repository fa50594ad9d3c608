"""Export: psi and theta only, as safetensors with a small JSON and a model card; phi is deleted (paper, section 3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cml_dist import __version__
from cml_dist.atomic import write_json, write_text
from cml_dist.config.methods import method_title
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.allocator import memory_explained
from cml_dist.distributed.world import joined_world
from cml_dist.errors import CheckpointError, ModelError
from cml_dist.meta.rule import LEARNED_RATES, part_of
from cml_dist.methods.build import describe_rule
from cml_dist.nets.guard import has_batch_norm
from cml_dist.nets.pretrained import DESCRIPTION, TIMM_WEIGHTS, WEIGHTS
from cml_dist.registry import TIMM, backbone_entry
from cml_dist.run.assemble import Parts, assemble
from cml_dist.run.checkpoint import choose
from cml_dist.run.folder import RunFolder
from cml_dist.run.report import overrides_of
from cml_dist.run.safetensors_stream import save_tensors
from cml_dist.telemetry import text
from cml_dist.telemetry.console import Console
from cml_dist.types import COLEARNER, INTERPOLATIONS

CARD = "README.md"
MOST_DESCRIPTION = 2**24
"""Bytes of ``model.json``: whoever made it may have written anything."""

FORMAT = 2
"""Format 1, still read, has the rates of plain SGD and what adapts, and no ``rule``."""

CARD_TEXT = """---
library_name: cml_dist
tags: [meta-learning, few-shot, maml]
---
# {backbone}, meta-trained with {method} on {data}

A learner for {task} tasks: adapt it on a few labelled examples, then predict.

| | |
|---|---|
| meta-trained parameters of body and head (the co-learner is deleted) | {parameters:,} |
| input | {input} |
| adaptation | {inner_steps} gradient step(s), step size {rates}; {head} head |
| {score}, mean and 95 % interval | {figure} |
| meta-training | {step:,} meta-steps of {episodes} episodes, seed {seed} |
"""

CARD_USE = """
```python
import cml_dist

learner = cml_dist.load("path/of/this/folder")
predicted = learner.adapt(support_{inputs}, support_{labels}).predict(query_{inputs})
```
"""

CARD_NODES = """
It reads nodes of a graph, with what they see of it: `cml-dist eval RUN_DIR domain.root=FILE` tests it on one.
"""

CARD_IMAGES = """
Images may be paths, PIL images or uint8 arrays of any size and kind: they are read as those of the training set were
packed (upright, transparency on white, the high byte of 16 bits, scaled to cover the input and cut at the centre), and
normalised by the mean and std in `model.json`.
"""

CARD_SCALED = """
They are fitted to {packed_size[0]}x{packed_size[1]} pixels first, and then scaled to the input ({interpolation}).
"""

CARD_NORM = """
BatchNorm uses the statistics of the examples that the learner is adapted on: each image is answered by itself. (In
training, and by default in tests, it uses those of the query images, as the paper does.) Running statistics, which
plain timm uses, are not kept by meta-training: re-estimate them.
"""

CARD_TIMM = """
`{file}` holds the same model under timm's own names:

```python
{first}timm.create_model({name!r}, checkpoint_path={file!r}, **{settings})
```
"""

CARD_ROWS = """
Norms have learned gains and biases for each inner step; under timm's names there are those of the first step alone.
"""


def export_again(config: RunConfig, which: str, to: str | None, console: Console) -> None:
    """Export a run's checkpoint by its configuration. Collective: all ranks (rank 0 writes)."""
    with joined_world(config) as world, memory_explained(world.device):
        parts = assemble(config, world, console, training=False)
        world.heartbeat.beat("the export")
        world.run_on_main(lambda: export_run(config, parts, console, which, to))


def export_run(
    config: RunConfig, parts: Parts, console: Console, which: str = "best", to: str | Path | None = None
) -> None:
    """Write the learner of a run's checkpoint to a folder, by default the run's own, and say so.

    A timm backbone is written a second time under timm's own names, so that
    ``timm.create_model(name, checkpoint_path=...)`` reads it.

    Raises:
        CheckpointError: there is no such checkpoint. CmlError: the folder cannot be written.
    """
    folder = RunFolder(config.run.dir)
    target = folder.export if to is None else Path(to)
    checkpoint, _ = choose(folder.checkpoints, which, parts.net, console.warn)
    params = checkpoint.params([n for n, _ in parts.net.named_parameters() if part_of(n) != COLEARNER])
    # Constants too: with frozen statistics the network is not whole without them.
    rule = parts.model.method.rule
    constants = {n: b for n, b in parts.net.named_buffers() if part_of(n) != COLEARNER and n not in rule.replaces}
    files = {WEIGHTS: {**params, **constants}}
    timm = None
    # A head that each episode starts is no classifier by itself.
    if backbone_entry(config.model.backbone) is TIMM and config.model.head == "linear":
        from cml_dist.nets.timm_backbone import timm_export

        try:
            files[TIMM_WEIGHTS], settings = timm_export(parts.net, rule.network(files[WEIGHTS], 0))
            timm = {"num_classes": parts.domain.output_dim, **settings}
        except ModelError:  # a few of timm's models have a classifier that a linear head does not fit
            pass
    # What does not adapt by the method, or is frozen, does not adapt in use either.
    adapts = sorted(n for n in rule.rates(parts.net.adaptable()) if part_of(n) != COLEARNER)
    description = {
        "format": FORMAT,
        "cml_dist": __version__,
        "backbone": config.model.backbone,
        "timm": timm,
        "input_shape": list(parts.domain.input_shape),
        "output_dim": parts.domain.output_dim,
        "score": parts.domain.score_name,
        "preprocessing": parts.domain.preprocessing(),
        "inner_steps": parts.plan.test_inner_steps,
        "method": method_title(config),
        "rule": describe_rule(rule, config.method.name, adapts),
        "model": config.model.model_dump(mode="json"),
        "step": checkpoint.step,
        "trained_on": config.domain.model_dump(mode="json"),
        "image_set": parts.domain.describe().get("name"),
        "eval": _tested(folder, checkpoint.step, overrides_of(config, parts, checkpoint)),
    }
    learned = [value.flatten() for name, value in params.items() if name.startswith(LEARNED_RATES)]
    rates = _rates(description["rule"], torch.cat(learned) if learned else None)
    card = _card(config, description, rates, sum(p.numel() for p in params.values()))
    if "mean" in description["preprocessing"]:
        card += CARD_IMAGES
    if "packed_size" in description["preprocessing"]:
        card += CARD_SCALED.format(**description["preprocessing"])
    if has_batch_norm(parts.net) and config.model.norm == "batch":
        card += CARD_NORM
    if timm is not None:
        first = "import cml_dist.nets\n" if parts.net.body.model.__module__.startswith("cml_dist.") else ""
        card += CARD_TIMM.format(first=first, file=TIMM_WEIGHTS, name=config.model.backbone, settings=timm)
        card += CARD_ROWS if rule.replaces else ""
    for name, tensors in files.items():
        save_tensors(target / name, tensors)
    write_text(target / CARD, card)
    write_json(target / DESCRIPTION, description)
    console.note(f"Exported model: {target}")


def _tested(folder: RunFolder, step: int, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """The run's own figures; None where they are of another step or task, which would be a lie."""
    try:
        tested = folder.own_test()
        if tested is None or tested["step"] != step or tested.get("overrides") or overrides:
            return None
        _figure(tested)
        return {key: tested[key] for key in ("meta", "split", "score")}
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = f"the test in {folder.path} is damaged ({type(error).__name__}: {str(error)[:200]})"
        raise CheckpointError(what, "test the run again: cml-dist eval RUN_DIR") from error


def _figure(tested: dict[str, Any]) -> str:
    """The score on the card."""
    meta = tested["meta"]
    shown = text.measured(tested["score"], meta["mean"], meta["ci95"], 2)
    return f"{shown} ({meta['episodes']:,} episodes of the {tested['split']} split)"


def _rates(rule: dict[str, Any], learned: Tensor | None) -> str:
    """The step sizes of the inner loop in words; those that were learned by their range."""
    body, head = rule["body_lr"], rule["head_lr"]
    if learned is None:
        return f"body {body:g}, head {head:g}"
    low, middle, high = (value.item() for value in (learned.min(), learned.median(), learned.max()))
    return f"learned: {low:.3g} to {high:.3g}, median {middle:.3g} (they began at: body {body:g}, head {head:g})"


def _card(config: RunConfig, description: dict[str, Any], rates: str, parameters: int) -> str:
    """The model card."""
    domain, tested = config.domain, description["eval"]
    figure = "not tested" if tested is None else text.markdown(_figure(tested))
    shots, ways = domain.shots, getattr(domain, "ways", None)
    card = CARD_TEXT + (CARD_NODES if domain.name == "graph_nodes" else CARD_USE)
    return card.format(
        **{key: text.markdown(description[key]) for key in ("backbone", "method", "inner_steps", "score")},
        step=description["step"],
        data=text.markdown(description["image_set"] or domain.name),
        task=f"{ways}-way {shots}-shot" if ways else f"{shots}-point regression",
        inputs="images" if ways else "inputs",
        labels="labels" if ways else "targets",
        parameters=parameters,
        input=" x ".join(map(str, description["input_shape"])),
        rates=rates,
        head=config.model.head,
        figure=figure,
        episodes=config.train.episodes_per_step,
        seed=config.run.seed,
    )


Side = Annotated[int, Field(ge=1, le=2**16)]


class _Scaling(BaseModel):
    """How pictures come to the input's size, where they do not have it."""

    packed_size: tuple[Side, Side]
    interpolation: Literal[INTERPOLATIONS]


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
    if description.get("format") not in (1, FORMAT):
        what = f"{where} has export format {description.get('format')}, this version reads {FORMAT}"
        raise CheckpointError(what, "update cml_dist")


def _no_model(where: Path, error: Exception) -> CheckpointError:
    remedy = "give a run folder, or what cml-dist export RUN_DIR wrote"
    return CheckpointError(f"{where} holds no exported model ({error})", remedy)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """psi, theta and constants of an exported model by canonical name, on the CPU; floating ones in float32."""
    try:
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"no file {WEIGHTS}")
        tensors = load_file(folder / WEIGHTS)
        return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is missing or damaged ({error})", "export the run again") from error
