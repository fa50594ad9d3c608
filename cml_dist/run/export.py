"""Export: psi and theta only, as safetensors with a small JSON and a model card; phi is deleted (paper, section 3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cml_dist import __version__
from cml_dist.atomic import atomic_file, write_json, write_text
from cml_dist.config.methods import method_title
from cml_dist.config.schema import RunConfig
from cml_dist.errors import CheckpointError, CmlError, ModelError
from cml_dist.meta.rule import part_of
from cml_dist.methods.build import describe_rule
from cml_dist.nets.guard import has_batch_norm
from cml_dist.registry import BACKBONES
from cml_dist.run.assemble import Parts
from cml_dist.run.checkpoint import check_same_run
from cml_dist.run.folder import RunFolder
from cml_dist.run.report import choose_checkpoint, overrides_of, warn_of_faults
from cml_dist.run.safetensors_stream import StreamWriter
from cml_dist.telemetry.console import Console
from cml_dist.types import BODY, COLEARNER, HEAD

WEIGHTS, TIMM_WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "timm.safetensors", "model.json", "README.md"
FORMAT = 2
"""Format 1, still read, has the rates of plain SGD and what adapts, and no ``rule``."""


def export_run(
    config: RunConfig,
    parts: Parts,
    folder: RunFolder,
    console: Console,
    which: str = "best",
    to: str | Path | None = None,
) -> Path:
    """Write the learner of a checkpoint to a folder; returns it.

    A timm backbone is written a second time under timm's own names, so that
    ``timm.create_model(name, checkpoint_path=...)`` reads it.

    Raises:
        CheckpointError: there is no such checkpoint, or the folder cannot be written.
    """
    choice = choose_checkpoint(folder, which)
    warn_of_faults(choice, console)
    checkpoint, _ = choice
    check_same_run(checkpoint, parts.net)
    target = Path(to) if to is not None else folder.export
    params = checkpoint.params([n for n, _ in parts.net.named_parameters() if part_of(n) != COLEARNER])
    # Constants too: with frozen statistics the network is not whole without them.
    tensors = {**params, **{n: b for n, b in parts.net.named_buffers() if part_of(n) != COLEARNER}}
    for_timm = _as_timm_model(config, parts, params)
    # Runs of earlier versions have no folder of tests.
    file = folder.own_eval_file if folder.own_eval_file.is_file() else folder.eval_file
    tested = json.loads(file.read_text()) if file.is_file() else None
    overrides = overrides_of(config, parts, folder, checkpoint)
    if tested is not None and (tested["step"] != checkpoint.step or tested.get("overrides") or overrides):
        tested = None  # figures of another step or task would be a lie
    rule = parts.model.method.rule
    # What does not adapt by the method, or is frozen, does not adapt in use either.
    adapts = sorted(n for n in rule.rates(parts.net.adaptable()) if part_of(n) != COLEARNER)
    description = {
        "format": FORMAT,
        "cml_dist": __version__,
        "backbone": config.model.backbone,
        "timm": for_timm and for_timm[1],
        "input_shape": list(parts.domain.input_shape),
        "output_dim": parts.domain.output_dim,
        "score": parts.domain.score_name,
        "preprocessing": parts.domain.preprocessing(),
        "inner_steps": parts.plan.test_inner_steps,
        "method": method_title(config),
        "rule": describe_rule(rule, adapts),
        "model": config.model.model_dump(mode="json"),
        "step": checkpoint.step,
        "trained_on": config.domain.model_dump(mode="json"),
        "image_set": parts.domain.describe().get("name"),
        "eval": tested and {"meta": tested["meta"], "split": tested["split"], "score": tested["score"]},
    }
    card = _card(config, description, params, has_batch_norm(parts.net) and config.model.norm == "batch")
    try:
        _save_tensors(target / WEIGHTS, tensors)
        if for_timm is not None:
            _save_tensors(target / TIMM_WEIGHTS, for_timm[0])
        write_text(target / CARD, card)
        write_json(target / DESCRIPTION, description)
    except (OSError, CmlError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot export to {target}: {reason}", "free space or choose another folder with --to"
        ) from error
    return target


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # Not by the library's save_file, which makes files that nobody but their owner may read, whatever the umask.
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with atomic_file(path) as temporary, StreamWriter(temporary, layout, {}) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor.cpu())
        writer.finish({})


def _as_timm_model(
    config: RunConfig, parts: Parts, params: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(state dict, keyword arguments) of the same model in plain timm; None where it is none of timm's.

    A few of timm's models have a classifier that a linear head does not fit: they have no such form either.
    """
    # A head that each episode starts is no classifier by itself.
    if config.model.backbone in BACKBONES or config.model.head != "linear":
        return None
    from cml_dist.nets.timm_backbone import timm_export

    try:
        state, kwargs = timm_export(parts.net, params)
    except ModelError:
        return None
    return state, {"num_classes": parts.domain.output_dim, **kwargs}


def _card(config: RunConfig, description: dict[str, Any], params: dict[str, Tensor], batch_statistics: bool) -> str:
    """The model card.

    Args:
        batch_statistics: whether the network has BatchNorms that use them.
    """
    domain, regression = config.domain, not hasattr(config.domain, "ways")
    name = description["image_set"] or domain.name
    task = f"{domain.shots}-point regression" if regression else f"{domain.ways}-way {domain.shots}-shot"
    labelled, asked = "support_images, support_labels", "query_images"
    if regression:
        labelled, asked = "support_inputs, support_targets", "query_inputs"
    timm = timm_norm = norm = ""
    if batch_statistics:
        norm = """
BatchNorm uses the statistics of the examples that the learner is adapted on: each image is answered by itself. (In \
training, and by default in tests, it uses those of the query images, as the paper does.)
"""
        timm_norm = "\nPlain timm uses running statistics, which meta-training does not keep: re-estimate them.\n"
    if description["timm"] is not None:
        settings = "".join(f", {key}={value!r}" for key, value in description["timm"].items())
        timm = f"""
`{TIMM_WEIGHTS}` holds the same model under timm's own names:

```python
timm.create_model("{config.model.backbone}"{settings}, checkpoint_path="{TIMM_WEIGHTS}")
```
{timm_norm}"""
    return f"""---
library_name: cml_dist
tags: [meta-learning, few-shot, maml]
---
# {config.model.backbone}, meta-trained with {description["method"]} on {name}

A learner for {task} tasks: adapt it on a few labelled examples, then predict.

| | |
|---|---|
| meta-trained parameters of body and head (the co-learner is deleted) | {sum(p.numel() for p in params.values()):,} |
| input | {" x ".join(map(str, description["input_shape"]))} |
| adaptation | {_adaptation(description)} |
| {description["score"]}{_figure(description["eval"])} |
| meta-training | {description["step"]:,} meta-steps of {config.train.episodes_per_step} episodes, \
seed {config.run.seed} |

```python
import cml_dist

learner = cml_dist.load("path/of/this/folder")
predicted = learner.adapt({labelled}).predict({asked})
```
{norm}{timm}"""


def _adaptation(description: dict[str, Any]) -> str:
    """How the learner adapts, in words."""
    rule, steps, head = description["rule"], description["inner_steps"], description["model"]["head"]
    parts = [part for part in (BODY, HEAD) if any(part_of(n) == part for n in rule["adapts"])]
    started = "" if head == "linear" else f"; the support set starts the head ({head}), for any number of classes"
    if not steps or not parts:
        return f"none{started}"
    rates = ", ".join(f"{part} {rule[f'{part}_lr']:g}" for part in parts)
    kind = {"InnerRule": "", "MetaSgd": ", where learning started", "Momentum": " (momentum)", "Adam": " (Adam)"}
    return f"{steps} gradient step{'s' * (steps != 1)}, step size {rates}{kind[rule['kind']]}{started}"


def _figure(tested: dict[str, Any] | None) -> str:
    """What was measured on how many episodes, and the figure; a diverged learner's is no number."""
    if tested is None:
        return " | not tested"
    meta = tested["meta"]
    mean, ci95 = ("not finite" if meta[key] is None else f"{meta[key]:.4f}" for key in ("mean", "ci95"))
    return f" ({meta['episodes']:,} episodes of the {tested['split']} split, 95 % interval) | {mean} +- {ci95}"


def read_description(folder: Path) -> dict[str, Any]:
    """The JSON of an exported model.

    Raises:
        CheckpointError: no exported model is there.
    """
    if not folder.exists():
        raise CheckpointError(f"there is no {folder}", "give a run folder, or one that cml-dist export wrote")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no exported model ({error})", "write one with cml-dist export RUN_DIR"
        ) from error
    if description.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"{folder} has export format {description.get('format')}, this version reads {FORMAT}", "update cml_dist"
        )
    return description


def read_weights(folder: Path) -> dict[str, Tensor]:
    """psi, theta and constants of an exported model by canonical name, on the CPU; floating ones in float32."""
    try:
        tensors = load_file(folder / WEIGHTS)
        return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is missing or damaged ({error})", "export the run again") from error
