"""What cannot be together in a configuration, whatever the network and the data: one line each, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cml_dist.config.methods import dagger_refusal, has_trained_colearner
from cml_dist.registry import METHODS


def contradictions(config: Any) -> Iterator[str]:
    """Every contradiction in a :class:`~cml_dist.config.schema.RunConfig`, in words."""
    yield from _of_method(config)
    model, method, engine = config.model, config.method, config.engine
    if config.eval.learner == "co" and (reason := dagger_refusal(config)) is not None:
        remedy = ", or eval.co_adapt=released" if has_trained_colearner(config) else ""
        yield f"eval.learner is co, but {reason}: set eval.learner=meta{remedy}"
    if model.colearner.kind == "prototype" and method.colearner == "adapts":
        yield (
            "model.colearner.kind is prototype, which has nothing that adapts by a support loss, but method.colearner "
            "is adapts: set model.colearner.kind=dense"
        )
    if not hasattr(config.domain, "ways"):
        without = f"but domain {config.domain.name} has no"
        if model.head != "linear":
            yield f"model.head is {model.head}, {without} classes: set model.head=linear"
        if model.colearner.kind == "prototype":
            yield f"model.colearner.kind is prototype, {without} classes: set model.colearner.kind=dense"
        if config.eval.permutations > 1:
            yield f"eval.permutations is {config.eval.permutations}, {without} labels: set eval.permutations=1"
    if model.head == "shared" and method.inner_steps == 0:
        yield (
            "model.head is shared, but method.inner_steps is 0: all classes keep the same vector; set "
            "method.inner_steps to 1 or more, or model.head=centroid or ridge"
        )
    if engine.name == "graph":
        whole = "but engine.name graph keeps the whole loop in memory: set engine.name=adjoint"
        if isinstance(engine.micro_batch, int):
            yield f"engine.micro_batch is set, {whole}"
        if engine.trajectory == "sqrt":
            yield f"engine.trajectory is sqrt, {whole}"


def _of_method(config: Any) -> Iterator[str]:
    method = config.method
    name, info = method.name, METHODS[method.name]
    if method.colearner is False and method.gamma:
        yield (
            f"method.gamma is {method.gamma:g}, but method.name {name} has no co-learner: set method.colearner=true, "
            "or leave method.gamma out"
        )
    if name == "cml" and method.colearner is False:
        yield "method.colearner is false, but method.name is cml: set method.name=maml, or method.colearner=true"
    if name == "fomaml" and method.order != 1:
        yield "method.order is 2, but method.name fomaml is first order: set method.name=maml, or method.order=1"
    only = info.adapts_only
    if only is not None:
        other = {"head": "body", "body": "head"}[only]
        alone = f"but method.name {name} adapts the {only} alone: leave method"
        elsewhere = (f"{other}.", "last:") if only == "head" else (f"{other}.",)
        if any(term == other or term.startswith(elsewhere) for term in method.adapts or ()):
            yield f"method.adapts is {list(method.adapts)}, {alone}.adapts out, or set method.name=maml"
        if rate := getattr(method, f"{other}_lr"):
            yield f"method.{other}_lr is {rate:g}, {alone}.{other}_lr out, or set method.name=maml"
    if info.target and method.inner_optim != "sgd":
        yield (
            f"method.inner_optim is {method.inner_optim}, but method.name {name} has a step of its own: set "
            "method.inner_optim=sgd, or method.name=maml"
        )
