"""What cannot be together in a configuration, whatever the network and the data: one line each, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cml_dist.config.methods import (
    adapting_rates,
    dagger_refusal,
    has_classes,
    has_trained_colearner,
    is_classifier,
    lora_rank,
    steps_in_all,
    unlabelled_kind,
)
from cml_dist.registry import backbone_entry, method_entry
from cml_dist.user_code import is_code


def contradictions(config: Any) -> Iterator[str]:
    """Every contradiction in a :class:`~cml_dist.config.schema.RunConfig`, in words."""
    model, method, engine, test = config.model, config.method, config.engine, config.eval
    name, info, prototype = method.name, method_entry(method.name), model.colearner.kind == "prototype"
    if method.colearner is False and method.gamma:
        remedy = "set method.colearner=true, or leave method.gamma out"
        yield f"method.gamma is {method.gamma:g}, but method.name {name} has no co-learner: {remedy}"
    if name == "cml" and method.colearner is False:
        yield "method.colearner is false, but method.name is cml: set method.name=maml, or method.colearner=true"
    control = info.settings.get("colearner")
    if control in ("adapts", "untrained") and method.colearner != control:
        said, other = str(method.colearner).lower(), "leave it out, or set method.name=cml or maml"
        yield f"method.colearner is {said}, but method.name {name} sets it to {control}: {other}"
    if name == "fomaml" and method.order != 1:
        yield "method.order is 2, but method.name fomaml is first order: set method.name=maml, or method.order=1"
    if name == "maml_pp" and method.inner_steps == 0:
        yield "method.inner_steps is 0, but method.name maml_pp learns rates for each step: set it to 1 or more"
    if name != "maml_pp" and method.multi_step_loss:
        remedy = "set method.name=maml_pp, or leave method.multi_step_loss out"
        yield f"method.multi_step_loss is {method.multi_step_loss}, but method.name {name} has none: {remedy}"
    if name != "sharp_maml" and method.sharp:
        remedy = "set method.name=sharp_maml, or leave method.sharp out"
        yield f"method.sharp is {method.sharp}, but method.name {name} has no ascent: {remedy}"
    if method.sharp in ("lower", "both") and steps_in_all(config) == 0:
        remedy = "set method.sharp=upper, or method.inner_steps to 1 or more"
        yield f"method.sharp is {method.sharp}, but method.inner_steps is 0: no step can ascend; {remedy}"
    warped = name in ("warpgrad", "tnet")
    if (method.warp or method.warp_residual) and not warped:
        key = "warp" if method.warp else "warp_residual"
        remedy = f"set method.name=warpgrad or tnet, or leave method.{key} out"
        yield f"method.{key} is {getattr(method, key)}, but method.name {name} has no warp layers: {remedy}"
    if name == "warpgrad" and method.inner_steps == 0:
        yield "method.inner_steps is 0, but method.name warpgrad learns from each step: set it to 1 or more"
    if method.augment and engine.compile != "off":
        masks = "but under method.augment each episode has masks of its own, which no graph can hold"
        yield f"engine.compile is {engine.compile}, {masks}: set engine.compile=off"
    if annealed := method.first_order_steps:
        said = f"method.first_order_steps is {annealed}, but"
        if method.order == 1:
            yield f"{said} method.order is 1 in all meta-steps: set method.order=2, or method.first_order_steps=0"
        elif annealed >= config.train.steps:
            yield f"{said} train.steps is {config.train.steps}: order 2 never begins; set method.order=1, or fewer"
    other = {"head": "body_lr", "body": "head_lr"}.get(info.adapts_only)
    if other and (rate := getattr(method, other)):
        alone = f"but method.name {name} adapts the {info.adapts_only} alone"
        yield f"method.{other} is {rate:g}, {alone}: leave method.{other} out, or set method.name=maml"
    if info.target and method.inner_optim != "sgd":
        own = f"but method.name {name} has a step of its own: set method.inner_optim=sgd, or method.name=maml"
        yield f"method.inner_optim is {method.inner_optim}, {own}"
    if method.inner_lr == "auto" and info.learns_rates:
        learns = f"but method.name {name} {'may learn' if is_code(name) else 'learns'} its rates"
        yield f"method.inner_lr is auto, {learns}: give the number that they start at"
    elif method.inner_lr == "auto" and "inner_lr" not in adapting_rates(config):
        yield "method.inner_lr is auto, but nothing adapts at it (inner_steps, head_lr, body_lr): leave it out"
    kind, examples = unlabelled_kind(config), getattr(config.domain, "unlabelled", 0)
    if kind != "none" and not examples:
        given = "is 0" if hasattr(config.domain, "unlabelled") else f"does not exist for {config.domain.name}"
        yield f"method.unlabelled is {kind}, but domain.unlabelled {given}: leave method.unlabelled out, or have some"
    if not examples and (others := getattr(config.domain, "distractors", 0)):
        without = "but domain.unlabelled is 0, and they lend nothing else: set domain.unlabelled"
        yield f"domain.distractors is {others}, {without}, or domain.distractors=0"
    if kind != "none" and model.head == "prototype":
        alone = "but model.head prototype compares with support examples alone"
        yield f"method.unlabelled is {kind}, {alone}: set method.unlabelled=none, or another model.head"
    if test.learner == "co" and (reason := dagger_refusal(config)) is not None:
        remedy = ", or eval.co_adapt=released" if has_trained_colearner(config) else ""
        yield f"eval.learner is co, but {reason}: set eval.learner=meta{remedy}"
    if config.train.patience and not test.every:
        never = "but eval.every is 0: nothing is validated before the end; set eval.every, or train.patience=null"
        yield f"train.patience is {config.train.patience}, {never}"
    if config.run.precision == "tf32" and config.run.device == "cpu":
        yield "run.precision is tf32, which no CPU has, but run.device is cpu: set run.precision=fp32"
    if (profiled := config.run.profiled_steps) and profiled[-1] > (steps := config.train.steps):
        yield f"run.profile is {config.run.profile}, but train.steps is {steps}: end it at {steps}, or train longer"
    if test.ensemble > (most := config.num_validations):
        yield f"eval.ensemble is {test.ensemble}, but the run has {most} validations: lower it, or eval.every"
    if prototype and method.colearner == "adapts":
        without = "which has nothing that adapts by a support loss, but method.colearner is adapts"
        yield f"model.colearner.kind is prototype, {without}: set model.colearner.kind=dense"
    if not has_classes(config):
        without = f"but domain {config.domain.name} has no"
        if model.head != "linear":
            yield f"model.head is {model.head}, {without} classes: set model.head=linear"
        if prototype:
            yield f"model.colearner.kind is prototype, {without} classes: set model.colearner.kind=dense"
        if test.permutations > 1:
            yield f"eval.permutations is {test.permutations}, {without} labels: set eval.permutations=1"
    if rank := lora_rank(method.adapts):
        lora = f"method.adapts has lora:{rank}"
        if info.target or warped or method.inner_optim != "sgd":
            yield f"{lora}, whose factors move by plain SGD: set method.name=maml and method.inner_optim=sgd"
        if info.adapts_only == "head":
            yield f"{lora}, but method.name {name} adapts the head alone: set method.name=maml"
        if model.head in ("centroid", "ridge"):
            reads = "starts from features of the network without its factors"
            yield f"{lora}, but model.head {model.head} {reads}: set model.head=linear or shared"
    if model.extra_blocks and model.backbone != "conv4":
        none = f"but model.backbone {model.backbone} has none: leave it out, or set model.backbone=conv4"
        yield f"model.extra_blocks is {model.extra_blocks}, {none}"
    if is_classifier(config):
        plain = {"method.inner_steps": 0, "method.colearner": False, "model.head": "linear", "eval.ensemble": 1}
        plain |= {"method.augment": None, "method.warp": None, "domain.unlabelled": 0}
        for key, value in plain.items():
            section, _, own = key.partition(".")
            if (now := getattr(getattr(config, section), own)) != value:
                remedy = f"set {key}={str(value).lower()} (as cml-dist pretrain does), or leave domain.batch out"
                yield f"domain.batch is {config.domain.batch}, a plain classifier's, but {key} is {now}: {remedy}"
    if model.init_from and model.pretrained:
        twice = f"but model.pretrained is {str(model.pretrained).lower()}: both say what the body starts from"
        yield f"model.init_from is {model.init_from}, {twice}; leave one of them out"
    for key, options, named in (
        ("method.options", method.options, method.name),
        ("model.options", model.options, model.backbone),
    ):
        if options and not is_code(named):
            yield f"{key} are {options}, but {named} has none: leave them out, or name code of your own (FILE.py:NAME)"
    if (reads := backbone_entry(model.backbone).reads) != "all" and not is_code(config.domain.name):
        nodes = config.domain.name == "graph_nodes"
        if nodes != (reads == "nodes"):
            remedy = "model.backbone=gcn" if nodes else "domain.name=graph_nodes, or choose another model.backbone"
            other = f"but domain.name is {config.domain.name}"
            yield f"model.backbone {model.backbone} reads {reads}, {other}: set {remedy}"
    if (number := getattr(config.domain, "splits", None)) is not None and not config.all_splits:
        yield f"domain.splits is {number}, but domain.split is {config.domain.split}: set domain.split=all"
    if config.domain.name == "graph_nodes":
        if isinstance(engine.micro_batch, int):
            shared = "nodes of a batch share their neighbourhoods, which each part of it would compute anew"
            yield f"engine.micro_batch is {engine.micro_batch}, but {shared}: set engine.micro_batch=auto"
        if config.domain.dropout and model.hidden[0] > 64:
            yield f"domain.dropout reaches 64 hidden units, but model.hidden is {list(model.hidden)}: lower the first"
    if model.head == "prototype" and isinstance(engine.micro_batch, int):
        means = "but model.head prototype compares each support example with the means of all"
        yield f"engine.micro_batch is {engine.micro_batch}, {means}: set engine.micro_batch=auto"
    if model.head == "shared" and method.inner_steps == 0:
        remedy = "set method.inner_steps to 1 or more, or model.head=centroid or ridge"
        yield f"model.head is shared, but method.inner_steps is 0: all classes keep the same vector; {remedy}"
    if engine.name == "graph":
        whole = "but engine.name graph keeps the whole loop in memory: set engine.name=adjoint"
        if isinstance(engine.micro_batch, int):
            yield f"engine.micro_batch is set, {whole}"
        if engine.trajectory == "sqrt":
            yield f"engine.trajectory is sqrt, {whole}"
