"""The model card of an export: what the model is, what it reached, and code that runs as it stands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cml_dist.config.schema import RunConfig
from cml_dist.run.record import versions
from cml_dist.run.status import now
from cml_dist.telemetry import text
from cml_dist.user_code import is_code, unsealed

UNKNOWN = "unknown"
"""Of a licence, as hubs call it."""

MOST_NAMES, MOST_ROWS = 20, 10
"""Names of classes, and rows of the learning curve."""

CARD = """---
license: {license_field}
library_name: cml_dist
pipeline_tag: {pipeline}
tags: [{tags}]
---
# {backbone}, meta-trained with {method} on {data}

A learner for {task} tasks: adapt it on a few labelled examples, then predict.

| | |
|---|---|
| meta-trained on | {classes} |
| {score}, mean and 95 % interval | {figure} |
| chance | {chance} |
| adaptation | {inner_steps} gradient step(s), step size {rates}; {head} head{pool} |
| input | {input} |
| meta-trained parameters of body and head (the co-learner is deleted) | {parameters:,} |
| meta-training | {step:,} meta-steps of {episodes} episodes, seed {seed} |
| exported | {made} |
| licence | {license} |
"""

CURVE = """
Learning curve, on episodes of the val split:

| meta-step | {score}, mean and 95 % interval |
|---|---|
{rows}
"""

USE = """
In this folder (the data are made up; yours go there):

```python
import numpy as np
import cml_dist
inputs = {inputs}
labels = {labels}
adapted = cml_dist.load("."{code}).adapt(inputs, labels)
print(adapted.predict(inputs[:3]))
```
"""

NODES = """
It reads nodes of a graph, with what they see of it: `cml-dist eval RUN_DIR domain.root=FILE` tests it on one.
"""

IMAGES = """
Images may be paths, PIL images or uint8 arrays of any size and kind: they are read as those of the training set were
packed (upright, transparency on white, the high byte of 16 bits, scaled to cover the input and cut at the centre), and
normalised by the mean and std in `model.json`.
"""

SCALED = """
They are fitted to {packed} pixels first, and then scaled to the input ({interpolation}).
"""

NORM = """
BatchNorm uses the statistics of the examples that the learner is adapted on: each image is answered by itself. (In
training, and by default in tests, it uses those of the query images, as the paper does.)
"""

TIMM = """
The {what} in `model.safetensors` under timm's own names, before any adaptation. Plain timm (1.0.26 or newer):

```python
{first}import timm
model = timm.create_model("local-dir:.", pretrained=True).eval()  # num_classes=0: features
```
"""

RUNNING = """
Its running statistics, which meta-training does not keep, are {running}.
"""

ROWS = """
Norms have learned gains and biases for each inner step; under timm's names there are those of the first step alone.
"""

LENGTH = """
The head reads the features scaled to length {feature_length} (`model.feature_length`), which plain timm does not do.
"""

OWN_NET = """
Plain timm does not know {backbone}{warps}: load it as above.
"""

ONNX = """
`model.onnx` has the features before any adaptation, of each image by itself; its metadata say what goes in and comes
out. An adapted classifier as ONNX: `adapted.to_onnx("classifier.onnx")`.
"""


def model_card(
    config: RunConfig,
    description: dict[str, Any],
    *,
    learned: Tensor | None,
    parameters: int,
    classes: Sequence[str],
    chance: float | None,
    curve: Sequence[dict[str, Any]],
    license: str,
    onnx: bool,
    by_batch: bool,
    running: bool,
    has_rows: bool,
    is_registered: bool,
) -> str:
    """The card.

    Args:
        description: ``model.json``.
        learned: all step sizes that were learned, in one row.
        classes: names of those that it was trained on.
        curve: lines of ``validation.jsonl``.
        onnx: whether there is an ONNX file.
        by_batch: whether norms go by the statistics of the examples at hand.
        running: whether running statistics of them were estimated.
        has_rows: whether each inner step has norms of its own.
        is_registered: whether timm knows the backbone by itself.
    """
    domain, tested, made = config.domain, description["eval"], versions()
    shots, ways, nodes = domain.shots, getattr(domain, "ways", None), domain.name == "graph_nodes"
    shape, said = description["input_shape"], description["preprocessing"]
    pictures = "mean" in said
    score = description["score"]
    names = {"method.name": config.method.name, "model.backbone": config.model.backbone, "domain.name": domain.name}
    own = [f"{key}={unsealed(name)}" for key, name in names.items() if is_code(name)]
    timm, curve = description["timm"], [line for line in curve if _is_whole(line)]
    optional = {
        _curve(score, curve): True,
        NODES if nodes else USE: True,
        IMAGES: pictures,
        SCALED: "packed_size" in said,
        NORM: by_batch,
        OWN_NET: pictures and timm is None,
        TIMM: timm is not None,
        RUNNING: timm is not None and by_batch,
        ROWS: timm is not None and has_rows,
        LENGTH: config.model.feature_length is not None,
        ONNX: onnx,
    }
    card = CARD + "".join(part for part, wanted in optional.items() if wanted)
    task = f"{'image' if pictures else 'tabular'}-{'classification' if ways else 'regression'}"
    tags = ["meta-learning", "few-shot-learning", "maml", *(["timm"] if timm else []), *(["onnx"] if onnx else [])]
    pixels = f"np.random.randint(0, 256, (10, {', '.join(map(str, [*shape[1:], shape[0]]))}), np.uint8)"
    return card.format(
        **{key: text.markdown(description[key]) for key in ("backbone", "method", "inner_steps", "score")},
        license_field=json.dumps(license),
        license="not stated" if license == UNKNOWN else text.markdown(license),
        pipeline="graph-ml" if nodes else task,
        tags=", ".join(tags),
        packed="x".join(map(str, said.get("packed_size", ())[::-1])),
        interpolation=said.get("interpolation"),
        feature_length=config.model.feature_length,
        warps=" with warp layers" if config.method.warp else "",
        step=description["step"],
        data=text.markdown(description["image_set"] or domain.name),
        task=f"{ways}-way {shots}-shot" if ways else f"{shots}-point regression",
        classes=_names(classes) if classes else "tasks, not classes" if not ways else "classes without names",
        chance=text.score(score, chance, 2) if chance is not None else "-",
        inputs=pixels if pictures else f"np.random.rand(10, {', '.join(map(str, shape))})",
        code=f", code={own}" if own else "",
        labels='["apple", "pear"] * 5' if ways else f"np.random.rand(10, {description['output_dim']})",
        what="model lies" if timm and timm["num_classes"] else "body lies",
        running="those of the first training episode" if running else "timm's initial values: estimate them anew",
        first="" if is_registered else "import cml_dist.nets\n",
        parameters=parameters,
        input=" x ".join(map(str, shape)),
        rates=_rates(description["rule"], learned),
        head=config.model.head,
        pool=_pool(config, description["unlabelled"]),
        figure="not tested" if tested is None else text.markdown(tested_figure(tested)),
        episodes=config.train.episodes_per_step,
        seed=config.run.seed,
        made=f"{now()[:10]}, by " + ", ".join(f"{name} {made[name]}" for name in ("cml_dist", "torch", "timm")),
    )


def tested_figure(tested: dict[str, Any]) -> str:
    """The score on the card."""
    meta = tested["meta"]
    shown = text.measured(tested["score"], meta["mean"], meta["ci95"], 2)
    return f"{shown} ({meta['episodes']:,} episodes of the {tested['split']} split)"


def _names(classes: Sequence[str]) -> str:
    more = f" and {len(classes) - MOST_NAMES:,} more" if len(classes) > MOST_NAMES else ""
    return f"{len(classes):,} classes: {', '.join(map(text.markdown, classes[:MOST_NAMES]))}{more}"


def _is_whole(line: dict[str, Any]) -> bool:
    """Whether a validation had a finite score, and nothing else stands there: a file may hold anything."""
    numbers = (line.get("mean"), line.get("ci95") or 0.0)
    return type(line["step"]) is int and all(type(number) is float for number in numbers)


def _curve(score: str, lines: Sequence[dict[str, Any]]) -> str:
    """A table of at most so many validations, the first and the last among them; empty where there is none."""
    if (last := len(lines) - 1) < 0:
        return ""
    shown = sorted({round(k * last / (MOST_ROWS - 1)) for k in range(MOST_ROWS)})
    figures = [(lines[k]["step"], text.measured(score, lines[k]["mean"], lines[k].get("ci95"), 2)) for k in shown]
    rows = [f"| {step:,} | {figure} |" for step, figure in figures]
    return CURVE.replace("{rows}", "\n".join(rows))


def _pool(config: RunConfig, unlabelled: dict[str, Any] | None) -> str:
    """What the figures had besides, where the learner uses unlabelled examples."""
    if unlabelled is None:
        return ""
    count = f"{unlabelled['steps']} further step(s) on {config.domain.unlabelled} unlabelled examples a class"
    return f"; the figures are with {count} (`adapt(inputs, labels, unlabelled=more)`)"


def _rates(rule: dict[str, Any], learned: Tensor | None) -> str:
    """The step sizes of the inner loop in words; those that were learned by their range."""
    body, head = rule["body_lr"], rule["head_lr"]
    if learned is None:
        return f"body {body:g}, head {head:g}"
    low, middle, high = (value.item() for value in (learned.min(), learned.median(), learned.max()))
    return f"learned: {low:.3g} to {high:.3g}, median {middle:.3g} (they began at: body {body:g}, head {head:g})"
