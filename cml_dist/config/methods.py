"""Methods by name: what each sets, what it is called, and what a co-learner can be beside it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RunConfig = Any
"""``schema.RunConfig``, which is checked by functions here."""


@dataclass(frozen=True)
class MethodInfo:
    """A method of ``method.name``.

    Attributes:
        title: what people call it.
        what: one line for ``--keys``.
        settings: its published defaults (settings of ``method.*``): above the schema's, below a recipe's for it.
        family: a recipe's ``method.*`` counts for all of the family that it names.
        adapts_only: the one part that adapts, where the method is defined by it.
    """

    title: str
    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    adapts_only: str | None = None


METHODS: dict[str, MethodInfo] = {
    "cml": MethodInfo("MAML", "MAML with the co-learner", {"colearner": True}, "maml"),
    "maml": MethodInfo("MAML", "all adapts, second order", {}, "maml"),
    "fomaml": MethodInfo("FOMAML", "MAML of first order", {"order": 1}, "maml"),
    "anil": MethodInfo(
        "ANIL",
        "the head alone adapts (Raghu et al., 1909.09157)",
        {"adapts": ["head"], "inner_steps": 1, "inner_lr": 0.5},
        adapts_only="head",
    ),
    "boil": MethodInfo(
        "BOIL",
        "the body alone adapts (Oh et al., 2008.08882)",
        {"adapts": ["body"], "inner_steps": 1, "inner_lr": 0.5},
        adapts_only="body",
    ),
    "meta_sgd": MethodInfo(
        "Meta-SGD",
        "a learned step size for every element, which starts at inner_lr (Li et al., 1707.09835)",
        {"inner_steps": 1, "inner_lr": 0.1},
    ),
}
"""Steps and rates of ANIL and BOIL are those of the BOIL line of work for Conv-4 (inner rate 0.5, one step)."""

NAME_DECIDES = ("colearner", "order")
"""Settings that a name of the family ``maml`` decides: a recipe's give way to another name."""


def family(name: str) -> str:
    """The family of a method; a method that is none's is its own."""
    return (METHODS[name].family if name in METHODS else "") or name


def method_title(config: RunConfig) -> str:
    """What ran, as tables, status and cards name it: ``CML``, ``BOIL + CML``, ``ANIL (ridge head)``."""
    method, head = config.method, config.model.head
    title, notes = METHODS[method.name].title, []
    if method.inner_steps == 0 and head in ("centroid", "ridge"):
        title = {"centroid": "ProtoNet", "ridge": "R2-D2"}[head]
    elif head != "linear":
        notes.append(f"{head} head")
    if method.inner_optim != "sgd":
        notes.append(f"inner {method.inner_optim.capitalize()}")
    if not notes and title == "MAML" and method.colearner is True:
        return "CML"
    title += f" ({', '.join(notes)})" if notes else ""
    with_it = " + CML" if noise_warning(config) is None else " + CML (guessing)"
    return title + {True: with_it, "untrained": " + noise", "adapts": " + CL"}.get(method.colearner, "")


def learner_title(config: RunConfig, learner: str) -> str:
    """The name of a learner's row: of the co-learner (eq. 9) that of the method with ``-dagger``."""
    return method_title(config) + ("-dagger" if learner == "co" else "")


def _body_adapts(config: RunConfig) -> bool:
    method = config.method
    rate = method.inner_lr if method.body_lr is None else method.body_lr
    named = method.adapts is None or any(term != "head" and not term.startswith("head.") for term in method.adapts)
    return method.inner_steps > 0 and rate > 0 and named


def task_blind(config: RunConfig) -> str | None:
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
    can = hasattr(config.domain, "ways") and config.method.colearner != "adapts"
    return "prototype" if can and task_blind(config) else "dense"


def noise_warning(config: RunConfig) -> str | None:
    """Where the configured co-learner cannot beat chance; None where it can, or is meant as noise."""
    reason = task_blind(config)
    if reason is None or config.method.colearner in (False, "untrained") or colearner_kind(config) == "prototype":
        return None
    said = f"the dense co-learner can only guess, since {reason}: what it adds to the meta-gradient is noise"
    if not hasattr(config.domain, "ways"):
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
