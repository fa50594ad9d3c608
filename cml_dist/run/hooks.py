"""Hooks: what a test or a user may look at, and interfere with, while a run trains."""

from __future__ import annotations

from collections.abc import Callable

OnStep = Callable[[int, str], None]
"""Called on every rank with the number of meta-steps done and what happened.

``assembled``: data, network and method are there; no checkpoint was looked for. ``started``: a new run begins, or a
checkpoint was resumed. ``episode``: a training episode of the next meta-step is about to be drawn on this rank.
``drawn``: it is here. ``computed``: this rank has its part of the meta-gradient, and the reduction over the ranks
begins; ``reduced``: that is over. ``step``: a meta-step is done, and its metrics are written. ``saved``: a checkpoint
is written; those no longer kept are still there. ``testing``: an episode of a validation or of the final test is about
to be scored on this rank. ``validated``: a validation is done, and its line is written. ``tested``: the final test is
written; the export comes next. ``closing``: files and trackers are about to be closed, also after an error.

What it raises ends the run as a fault there would; a stop signal that it sends to its own process stops it in order.
"""


def nothing(step: int, what: str) -> None:
    """The hook of a run that has none."""
