"""The meta-gradient compiled: one graph of values, with all its derivatives, for each shape of an episode."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from cml_dist.meta.gradient import Engine, MetaGradient, meta_gradient
from cml_dist.meta.problem import Problem
from cml_dist.meta.rule import Method
from cml_dist.types import Episode, Params

MOST_GRAPHS = 4
"""Of different shapes; a run that needs more would compile all day."""

CHECKED = 2
"""Episodes on which a graph is compared with eager arithmetic: what one episode leaves in it shows at the next."""

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Of the relative difference from eager arithmetic, a million times its rounding, which second order may amplify so
much; where it is larger in float32, float64 decides."""

SWITCHED = 1e-2
"""What a few ReLUs and maxima that rounding switches move a float32 meta-gradient by, beside ten times of what they
move the eager one by. What is wrong in a graph is a term of it, and larger."""

Eager = Callable[[Params, Episode, Problem], MetaGradient]
""":func:`meta_gradient` of a method by an engine, at a meta-step."""

_traced: ContextVar[bool] = ContextVar("traced", default=False)


def is_traced() -> bool:
    """Whether this is being written down for a compiler, which fuses what runs element by element, and nothing else."""
    return _traced.get()


@dataclass
class Graph:
    """A compiled meta-gradient; None where it could not be made, or was found wrong."""

    run: Callable[..., tuple[Params, dict[str, Tensor]]] | None
    checked: int = 0


class CompiledGradient:
    """:func:`meta_gradient` by a compiled graph for each shape of an episode; eager where that cannot be had.

    ``torch.compile`` has no double backward, so what it gets is not the loss but the finished meta-gradient, traced
    with both derivatives inside. It can be silently wrong all the same: each graph's first episodes are compared with
    eager arithmetic.

    Args:
        backend, mode: of ``torch.compile``.
        tell: takes sentences for people: what is compiled, how long it took, why it is not used.
        busy: entered while a graph is made, which takes up to minutes.

    Episodes that are diagnosed are computed eagerly.
    """

    def __init__(
        self,
        backend: str = "inductor",
        mode: str | None = None,
        tell: Callable[[str], None] = lambda sentence: None,
        busy: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.backend, self.mode, self.tell, self.busy = backend, mode, tell, busy
        self.graphs: dict[Hashable, Graph] = {}
        self._schedule: Hashable = None
        self._told_of_shapes = False

    @property
    def is_used(self) -> bool:
        """Whether there is a graph, found right so far."""
        return any(graph.run is not None for graph in self.graphs.values())

    def __call__(
        self,
        params: Params,
        episode: Episode,
        problem: Problem,
        method: Method,
        engine: Engine | str,
        *,
        diagnose: bool = False,
        meta_step: int = 0,
    ) -> MetaGradient:
        """As :func:`meta_gradient`; the same value to rounding."""

        def eager(params: Params, episode: Episode, problem: Problem) -> MetaGradient:
            return meta_gradient(params, episode, problem, method, engine, diagnose=diagnose, meta_step=meta_step)

        if diagnose and len(problem.learners) == 2:
            return eager(params, episode, problem)
        tensors = [tensor for batch in episode.batches for tensor in batch.tensors()]
        arguments = params, dict(problem.buffers), tensors
        shapes = tuple((t.shape, t.stride(), t.dtype) for t in (*params.values(), *tensors))
        schedule = method.at(meta_step).order, method.rule.terms(meta_step, method.steps)
        if schedule != self._schedule:  # what was before does not come again
            self.graphs, self._schedule = {}, schedule
        key = shapes, episode.ways
        if key not in self.graphs and len(self.graphs) < MOST_GRAPHS:
            self.graphs[key] = self._made(eager, arguments, episode, problem)
        graph = self.graphs.get(key)
        if graph is None and not self._told_of_shapes:
            self.tell(f"Episodes have more than {MOST_GRAPHS} shapes: the others are not compiled")
            self._told_of_shapes = True
        if graph is None or graph.run is None:
            return eager(params, episode, problem)
        with torch.no_grad():
            if self.mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()  # what the graph gave before may be overwritten
            found = MetaGradient(*graph.run(*arguments))
        if graph.checked < CHECKED:
            right = eager(params, episode, problem)
            if all(g.isfinite().all() for g in right.grads.values()):  # a diverged one proves nothing
                graph.checked += 1
                if self._differs(found, right, lambda: _in_float64(eager, params, episode, problem)):
                    graph.run = None
                    return right
        return found

    def _made(
        self, eager: Eager, arguments: tuple[Params, Params, list[Tensor]], episode: Episode, problem: Problem
    ) -> Graph:
        def whole(params: Params, buffers: Params, tensors: list[Tensor]) -> tuple[Params, dict[str, Tensor]]:
            left, here = iter(tensors), copy.copy(problem)
            here.buffers = buffers
            found = eager(params, episode.map(lambda _: next(left)), here)
            return found.grads, found.terms

        from torch.fx.experimental.proxy_tensor import make_fx  # with SymPy, which takes a second

        self.tell("Compiling the meta-step: about a minute, seconds where it was compiled before")
        began_s = time.monotonic()
        try:
            with self.busy():
                # Traced without values: what would depend on them, as a branch in Python does, is an error.
                token = _traced.set(True)
                try:  # in this thread alone: in one of autograd's nothing would know that it is traced
                    with torch.autograd.set_multithreading_enabled(False):
                        traced = make_fx(whole, tracing_mode="fake")(*arguments)
                finally:
                    _traced.reset(token)
                run = torch.compile(traced, backend=self.backend, mode=self.mode, fullgraph=True, dynamic=False)
                with torch.no_grad():
                    run(*arguments)
        except Exception as error:  # whatever a tracer, a compiler or a missing C++ compiler says
            error = getattr(error, "inner_exception", error)
            reason = (str(error).strip().splitlines() or [""])[0]
            self.tell(f"The meta-step is not compiled: {type(error).__name__}: {reason}")
            return Graph(None)
        self.tell(f"Compiled the meta-step in {time.monotonic() - began_s:.0f} s")
        return Graph(run)

    def _differs(self, found: MetaGradient, eager: MetaGradient, in_float64: Callable[[], MetaGradient]) -> bool:
        """Whether a compiled value is further from eager arithmetic than rounding can explain; says so."""
        dtype = next(iter(eager.grads.values())).dtype
        error = distance(found.grads, eager.grads)
        if error <= TOLERANCE[dtype]:
            return False
        said = f"{error:.1e} from that of eager arithmetic"
        if dtype == torch.float32:
            # Second-order gradients can be so sensitive to rounding that two right values differ by percents.
            try:
                right = in_float64().grads
            except Exception as failed:  # no memory for it, or a network that has no float64
                said += f" (in float64 it cannot be computed: {type(failed).__name__})"
            else:
                error, off = distance(found.grads, right), distance(eager.grads, right)
                if error <= 10 * off + SWITCHED:
                    return False
                said = f"{error:.1e} off, that of eager arithmetic {off:.1e}"
        self.tell(f"The compiled meta-step is wrong: its gradient is {said}; it is not used")
        return True


def distance(one: Params, other: Params) -> float:
    """L2 distance of two gradients over the norm of the second."""
    pairs = [(g.double() - other[n].double(), other[n].double()) for n, g in one.items()]
    parts = (torch.stack([torch.linalg.vector_norm(t) for t in side]).norm() for side in zip(*pairs, strict=True))
    difference, norm = (part.item() for part in parts)
    return difference / norm if norm else difference


def _in_float64(eager: Eager, params: Params, episode: Episode, problem: Problem) -> MetaGradient:
    exact = copy.copy(problem)
    exact.buffers, exact.autocast = {n: _double(b) for n, b in problem.buffers.items()}, None
    return eager({n: p.double() for n, p in params.items()}, episode.map(_double), exact)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
