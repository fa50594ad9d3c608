"""What a configured method is called, and what a co-learner can be beside it. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cml_dist.registry import method_entry

RunConfig = Any  # schema.RunConfig, which imports from here


def is_classifier(config: RunConfig) -> bool:
    """Whether batches of images with the number of their class stand in the place of training episodes."""
    return getattr(config.domain, "batch", None) is not None


def unlabelled_kind(config: RunConfig) -> str:
    """``none``, ``soft_labels`` or ``meta_gradient``: what ``method.unlabelled`` means here."""
    has_them = getattr(config.domain, "unlabelled", 0) > 0
    return config.method.unlabelled or ("meta_gradient" if has_them else "none")


def unlabelled_steps(config: RunConfig) -> int:
    """Inner steps on unlabelled examples too, after those on the support set alone."""
    method = config.method
    return 0 if unlabelled_kind(config) == "none" else method.unlabelled_steps or max(method.inner_steps, 1)


def steps_in_all(config: RunConfig) -> int:
    """Inner steps on the support set, and those on unlabelled examples too."""
    return config.method.inner_steps + unlabelled_steps(config)


def method_title(config: RunConfig) -> str:
    """What ran, as tables, status and cards name it: ``CML``, ``BOIL + CML``, ``ANIL (ridge head)``."""
    if is_classifier(config):
        return "classifier"
    method, head = config.method, config.model.head
    title, notes = method_entry(method.name).title, []
    if steps_in_all(config) == 0 and head in ("centroid", "ridge"):
        title = {"centroid": "ProtoNet", "ridge": "R2-D2"}[head]
    elif head != "linear":
        notes.append(f"{head} head")
    if method.inner_optim != "sgd":
        notes.append(f"inner {method.inner_optim.capitalize()}")
    if method.sharp in ("lower", "upper"):
        notes.append(f"{method.sharp} level")
    if (kind := unlabelled_kind(config)) != "none":
        notes.append({"soft_labels": "soft labels", "meta_gradient": "refined labels"}[kind])
    if not notes and title == "MAML" and method.colearner is True and noise_warning(config) is None:
        return "CML" + _augmented(method)
    if not notes and title == "MAML" and method.augment and method.colearner is False:
        return "MGAug"
    title += f" ({', '.join(notes)})" if notes else ""
    with_it = " + CML" if noise_warning(config) is None else " + CML (guessing)"
    title += {True: with_it, "untrained": " + noise", "adapts": " + CL"}.get(method.colearner, "")
    return title + _augmented(method)


def _augmented(method: Any) -> str:
    return " + MGAug" if method.augment else ""


def has_upper_ascent(config: RunConfig) -> bool:
    """Whether a meta-step goes through its episodes twice (Sharp-MAML's upper level)."""
    return config.method.sharp in ("upper", "both")


def sub_networks_in_words(method: Any) -> str:
    """What ``method.augment`` adds to a meta-step, e.g. ``2 sub-networks (width pruned by 0.1, 0.3)``."""
    count = len(method.augment_ratios)
    ratios = ", ".join(f"{ratio:g}" for ratio in method.augment_ratios)
    over_all = " over the whole body" * (method.augment_pruning == "catfish" and method.augment_scope == "network")
    return f"{count} sub-network{'s' * (count > 1)} ({method.augment_pruning} pruned by {ratios}{over_all})"


def warp_settings(method: Any) -> dict[str, Any] | None:
    """Of the warp layers, as an export keeps them; None: there are none."""
    return {"kind": method.warp, "residual": method.warp_residual} if method.warp else None


def last_row_note(config: RunConfig) -> str | None:
    """What steps use for which nothing was learned, where a test has more steps than training; None: it has not."""
    trained, tested = config.method.inner_steps, config.eval.inner_steps or 0
    if config.method.name != "maml_pp" or tested <= trained:
        return None
    return f"steps after {trained} go on with the rates and norms of step {trained}"


def learner_title(config: RunConfig, learner: str) -> str:
    """The method's title, of the co-learner (eq. 9) with ``-dagger``."""
    return method_title(config) + {"co": "-dagger"}.get(learner, ", nearest centroid" * is_classifier(config))


def lora_rank(adapts: Sequence[str] | None) -> int:
    """The rank in the term ``lora:RANK`` of ``method.adapts``; 0 without one."""
    found = [re.fullmatch(r"lora:([1-9]\d*)", term) for term in adapts or ()]
    return max((int(match[1]) for match in found if match), default=0)


def adapting_rates(config: RunConfig) -> list[str]:
    """The settings of ``method`` that set the step sizes of what adapts; none where nothing does."""
    method, only = config.method, method_entry(config.method.name).adapts_only
    parts = [part for part in ("head", "body") if only in (None, part)] if steps_in_all(config) else []
    named = (f"{part}_lr" if getattr(method, f"{part}_lr") is not None else "inner_lr" for part in parts)
    return list(dict.fromkeys(named))


def with_rate(config: RunConfig, rate: float) -> RunConfig:
    """The configuration with another ``method.inner_lr``."""
    return config.model_copy(update={"method": config.method.model_copy(update={"inner_lr": rate})})


def has_classes(config: RunConfig) -> bool:
    """Whether the domain is of classes, and not of regression."""
    return getattr(config.domain, "ways", 0) != 0


def _body_adapts(config: RunConfig) -> bool:
    method = config.method
    rate = method.rate if method.body_lr is None else method.body_lr
    terms = config.model.trained if method.adapts is None else method.adapts  # what is frozen adapts as little
    named = any(term != "head" and not term.startswith("head.") for term in terms)
    return steps_in_all(config) > 0 and rate > 0 and named


def _task_blind(config: RunConfig) -> str | None:
    """Why adapted features cannot tell a co-learner what it would need to know of the task; None: they can.

    Labels are shuffled anew in each episode, so that a co-learner that does not adapt then only guesses.
    """
    if not _body_adapts(config):
        return "the body does not adapt"
    if config.model.head != "linear":
        return f"model.head {config.model.head} treats all labels alike"
    return None


def colearner_kind(config: RunConfig) -> str:
    """``dense`` or ``prototype``: what ``model.colearner.kind`` means here."""
    kind = config.model.colearner.kind
    if kind != "auto":
        return kind
    can = has_classes(config) and config.method.colearner != "adapts"
    return "prototype" if can and _task_blind(config) else "dense"


def has_fixed_ways(config: RunConfig) -> bool:
    """Whether the network has an output for each class, so that it is tested with as many as it was trained with."""
    dense = config.method.colearner is not False and colearner_kind(config) == "dense"
    return config.model.head == "linear" or dense


def noise_warning(config: RunConfig) -> str | None:
    """Where the configured co-learner cannot beat chance; None where it can, or is meant as noise."""
    reason = _task_blind(config)
    if reason is None or config.method.colearner in (False, "untrained") or colearner_kind(config) == "prototype":
        return None
    said = f"the dense co-learner can only guess, since {reason}: what it adds to the meta-gradient is noise"
    if not has_classes(config):
        return said
    return f"{said} (labels are shuffled in each episode); model.colearner.kind=prototype can do better"


def dagger_refusal(config: RunConfig) -> str | None:
    """Why CML-dagger (eq. 9) is not defined for a configuration; None: it is."""
    if config.method.colearner is False:
        return f"method.name {config.method.name} has no co-learner"
    if not has_trained_colearner(config):
        return "the co-learner is not trained (method.colearner=untrained)"
    if config.eval.co_adapt == "released":
        return None
    if not _body_adapts(config):
        return f"eq. 9 adapts the body alone, which does not adapt under method.name {config.method.name}"
    if colearner_kind(config) == "prototype":
        return "eq. 9 adapts by the co-learner's loss on the support set, of which its prototypes are made"
    return None


def has_trained_colearner(config: RunConfig) -> bool:
    """Whether there is one to score; after the meta-learner's own adaptation (``released``) it always can be."""
    return config.method.colearner in (True, "adapts")
