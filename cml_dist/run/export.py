"""Export: psi and theta only, as safetensors with a small JSON and a model card; phi is deleted (paper, section 3)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cml_dist import __version__
from cml_dist.config.methods import method_title
from cml_dist.config.schema import RunConfig
from cml_dist.errors import CheckpointError, ModelError
from cml_dist.meta.rule import part_of
from cml_dist.methods.build import describe_rule
from cml_dist.nets.guard import has_batch_norm
from cml_dist.run.assemble import Parts
from cml_dist.run.checkpoint import check_constants, check_fits, layout_of
from cml_dist.run.folder import RunFolder, write_json
from cml_dist.run.report import choose_checkpoint, overrides_of
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
        CheckpointError: there is no such checkpoint, the folder cannot be written, or a later start of the run has
            taken it over.
    """
    choice = choose_checkpoint(folder, which)
    choice.say(console)
    checkpoint = choice.checkpoint
    check_fits(checkpoint, layout_of(parts.net))
    check_constants(checkpoint, parts.net)
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
        "inner_steps": config.method.inner_steps if config.eval.inner_steps is None else config.eval.inner_steps,
        "method": method_title(config),
        "rule": describe_rule(rule, adapts),
        "model": config.model.model_dump(mode="json"),
        "step": checkpoint.step,
        "trained_on": config.domain.model_dump(mode="json"),
        "image_set": parts.domain.describe().get("name"),
        "eval": tested and {"meta": tested["meta"], "split": tested["split"], "score": tested["score"]},
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        _save_tensors(target / WEIGHTS, tensors, folder.check_ours)
        if for_timm is not None:
            _save_tensors(target / TIMM_WEIGHTS, for_timm[0], folder.check_ours)
        card = _card(config, description, params, has_batch_norm(parts.net) and config.model.norm == "batch")
        folder.check_ours()
        (target / CARD).write_text(card, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"cannot export to {target}: {reason}", "free space or choose another folder with --to"
        ) from error
    write_json(target / DESCRIPTION, description)
    return target


def _save_tensors(path: Path, tensors: dict[str, Tensor], before: Callable[[], None]) -> None:
    """Write a file under a temporary name, and rename it after ``before``, which may call it off."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        # Not by the library's save_file, which makes files that nobody but their owner may read, whatever the umask.
        with StreamWriter(temporary, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {}) as writer:
            for name, tensor in tensors.items():
                writer.put(name, tensor.cpu())
            writer.finish({})
        before()
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _as_timm_model(
    config: RunConfig, parts: Parts, params: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(state dict, keyword arguments) of the same model in plain timm; None where it is none of timm's.

    A few of timm's models have a classifier that a linear head does not fit: they have no such form either.
    """
    # A head that each episode starts is no classifier by itself.
    if config.model.backbone in ("conv4", "mlp") or config.model.head != "linear":
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
    count = sum(p.numel() for p in params.values())
    tested = description["eval"]
    domain = config.domain
    name = description["image_set"] or domain.name
    task = f"{domain.ways}-way {domain.shots}-shot" if domain.name != "sinusoid" else f"{domain.shots}-point regression"
    use = ("support_images, support_labels", "query_images")
    if domain.name == "sinusoid":
        use = ("support_inputs, support_targets", "query_inputs")
    lines = [
        "---",
        "library_name: cml_dist",
        "tags: [meta-learning, few-shot, maml]",
        "---",
        f"# {config.model.backbone}, meta-trained with {description['method']} on {name}",
        "",
        f"A learner for {task} tasks: adapt it on a few labelled examples, then predict.",
        "",
        "| | |",
        "|---|---|",
        f"| meta-trained parameters of body and head (the co-learner is deleted) | {count:,} |",
        f"| input | {' x '.join(map(str, description['input_shape']))}{_normalised(description['preprocessing'])} |",
        f"| adaptation | {_adaptation(description)} |",
        f"| {description['score']}{_figure(tested)} |",
        f"| meta-training | {description['step']:,} meta-steps of {config.train.episodes_per_step} episodes, "
        f"seed {config.run.seed} |",
        "",
        "```python",
        "import cml_dist",
        "",
        'learner = cml_dist.load("path/of/this/folder")',
        f"predicted = learner.adapt({use[0]}).predict({use[1]})",
        "```",
        "",
    ]
    if batch_statistics:
        lines += [
            "BatchNorm uses the statistics of the examples that the learner is adapted on: each image is answered by "
            "itself. (In training, and by default in tests, it uses those of the query images, as the paper does.)",
            "",
        ]
    if description["timm"] is not None:
        kwargs = "".join(f", {key}={value!r}" for key, value in description["timm"].items())
        lines += [
            f"`{TIMM_WEIGHTS}` holds the same model under timm's own names:",
            "",
            "```python",
            f'timm.create_model("{config.model.backbone}"{kwargs}, checkpoint_path="{TIMM_WEIGHTS}")',
            "```",
            "",
        ]
        if batch_statistics:
            lines += [
                "Plain timm uses running statistics, which meta-training does not keep: adapt or re-estimate them.",
                "",
            ]
    return "\n".join(lines)


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


def _normalised(preprocessing: dict[str, Any]) -> str:
    """How pixels are normalised, in words."""
    if not preprocessing:
        return ""
    mean, std = (", ".join(f"{x:.4f}" for x in preprocessing[key]) for key in ("mean", "std"))
    return f", pixels / 255, minus mean {mean}, over std {std}"


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
