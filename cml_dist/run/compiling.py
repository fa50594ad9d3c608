"""``engine.compile``: whether meta-steps are compiled, and whether they stay so."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

from cml_dist.config.schema import RunConfig
from cml_dist.distributed.world import World
from cml_dist.meta.compiled import CompiledGradient
from cml_dist.meta.gradient import meta_gradient
from cml_dist.meta.model import MetaModel
from cml_dist.telemetry.console import Console

MEASURED = 10
"""Meta-steps of which ``auto`` takes the median."""

WORTH_S = 900.0
"""``auto``: seconds of training that must be left. A compilation takes one or two minutes, and saves a part of them."""

COMPILING_S = 1800.0
"""A compilation may take so long before a rank that is at it counts as standing still."""


class Compiling:
    """Switches a model between compiled and eager meta-gradients, on all ranks at the same step.

    Args:
        decided: what ``auto`` found in an earlier start of the run; None: nothing yet.

    Attributes:
        decided: whether meta-steps are compiled; None while ``auto`` still measures.
    """

    def __init__(
        self, config: RunConfig, model: MetaModel, world: World, console: Console, decided: bool | None
    ) -> None:
        self.model, self.world = model, world
        self.tell = console.note  # of other ranks it goes to their logs
        mode = None if config.engine.compile_mode == "default" else config.engine.compile_mode
        self.compiled = CompiledGradient(mode=mode, tell=self.tell, busy=self._busy)
        asked = {"on": True, "off": False, "auto": decided}
        self.decided = asked[config.engine.compile]
        self.eager_s: float | None = None
        self._seconds: list[float] = []
        if self.decided:
            model.compute = self.compiled

    def after_step(self, seconds: float, steps_left: int) -> None:
        """Take in how long a meta-step took. Collective while ``auto`` still measures: all ranks."""
        if self.decided is not None:
            return
        self._seconds.append(self.world.max(seconds))
        if len(self._seconds) <= MEASURED:  # the first warms up, or compiles
            return
        median = statistics.median(self._seconds[1:])
        self._seconds.clear()
        if self.eager_s is None:
            self.eager_s = median
            if median * steps_left >= WORTH_S:
                self.model.compute = self.compiled
            else:
                self.decided = False
        else:
            self.decided = median < self.eager_s and self.compiled.is_used
            if not self.decided:
                self.model.compute = meta_gradient
            kept = "kept" if self.decided else "given up"
            self.tell(f"A compiled meta-step takes {median:.3g} s, an eager one {self.eager_s:.3g} s: {kept}")

    @contextmanager
    def _busy(self) -> Iterator[None]:
        heartbeat = self.world.heartbeat
        # It warns of a CUDA compiler without a GPU, wherever there is one.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        heartbeat.beat("compiling the meta-step", COMPILING_S)
        yield
        heartbeat.beat("the compiled meta-step")
