"""What validations decide: the best step, which checkpoints stay, and whether training goes on.

All of it lies in the state that checkpoints hold, the same on every rank: a resumed run decides as it would have.
"""

from __future__ import annotations

from typing import Any

from cml_dist.config.schema import RunConfig


def take_in(config: RunConfig, state: dict[str, Any], line: dict[str, Any], higher_is_better: bool) -> None:
    """A new line of ``validation.jsonl``: is it the best, or one of those for the ensemble?"""
    best, mean, sign = state["best"], line["mean"], 1 if higher_is_better else -1
    lines = [*best_lines(state), line]
    state["validated"] = line["step"]
    if mean is not None and (best is None or sign * mean > sign * best["mean"]):
        state["best"] = line
    if (most := config.eval.ensemble) > 1:
        lines = [one for one in lines if one["mean"] is not None]  # a diverged learner's
        state["top"] = sorted(lines, key=lambda one: -sign * one["mean"])[:most]


def best_lines(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the validations that an ensemble is made of, the best first: one alone where the run was to keep no more."""
    return state.get("top") or [line for line in [state.get("best")] if line is not None]


def kept_steps(state: dict[str, Any]) -> set[int]:
    """Steps whose checkpoints the test will use."""
    return {line["step"] for line in (state["best"], *state.get("top", ())) if line is not None}


def without_gain(config: RunConfig, state: dict[str, Any]) -> int:
    """Validations since the best one, of those every ``eval.every`` steps."""
    since = state["best"]["step"] if state["best"] else 0
    return state["validated"] // every - since // every if (every := config.eval.every) else 0


def ended_early(config: RunConfig, state: dict[str, Any], step: int) -> str:
    """Why training ends at ``step``, which is not the last, in words: ``train.patience`` is used up; else empty."""
    best, count = state["best"], without_gain(config, state)
    if config.train.patience is None or count < config.train.patience or step == config.train.steps:
        return ""
    found = f"best at step {best['step']}" if best else "none with a finite score"
    return f"no gain in {count} validation{'s' * (count > 1)}, {found}"
