"""Carry the meta-gradient: one forward, one backward and one reduction a meta-step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from cml_dist.distributed.optim import set_rate
from cml_dist.distributed.world import World
from cml_dist.meta.model import MetaModel
from cml_dist.types import Episode, Layout, Params


class Carrier:
    """What all strategies share: how the mean meta-gradient is asked for, what is saved. A subclass says where it lies.

    Args:
        world: the processes.
        model: this rank's :class:`MetaModel`; rank 0's values win.
        optimizer: on ``model.values``.
    """

    def __init__(self, world: World, model: MetaModel, optimizer: torch.optim.Optimizer) -> None:
        self.world = world
        self.model = model.to(world.device)
        self.optimizer = optimizer
        self._shapes = {name: tuple(value.shape) for name, value in self._named()}
        self._wrap()

    def gradient(
        self,
        episodes: Iterable[Episode],
        num_global: int,
        diagnose: frozenset[int] = frozenset(),
        meta_step: int = 0,
        meanwhile: Callable[[dict[str, Tensor]], Any] = lambda sums: sums,
    ) -> Any:
        """Put the mean meta-gradient of all ranks' episodes where ``apply`` finds it; return what ``meanwhile`` does.

        Args:
            episodes: this rank's share (may be empty), gone through as often as the method says.
            num_global: episodes of the meta-step over all ranks. The wrapper averages over ranks, so each episode
                weighs N / num_global: exact also where N does not divide num_global.
            diagnose, meta_step: see :class:`MetaModel`.
            meanwhile: called with this rank's sums of terms just before the reduction, beside which it may start one
                of its own; by default it returns them.

        Collective: all ranks.
        """
        self._clear()
        weight = self.world.size / num_global
        loss, sums = self._wrapped(episodes, weight, diagnose, meta_step, self.world.average)
        found = meanwhile(sums)
        self._backward(loss)
        return found

    def apply(self, lr: float, clip_norm: float | None) -> tuple[float, bool]:
        """One outer step with the mean meta-gradient; skipped, on all ranks alike, where it is not finite.

        Returns:
            (global L2 norm before clipping, whether the step was taken).
        """
        raise NotImplementedError

    def params(self) -> Params:
        """All meta-parameters by canonical name, whole, on this device. Collective under ZeRO-3: all ranks."""
        return {name: self._whole(value, None).to(self.world.device) for name, value in self._named()}

    def saved_layout(self) -> Layout:
        """Type and shape of all that :meth:`saved_tensors` will give, in its order. Collective: none."""
        layout: Layout = {f"param/{name}": (value.dtype, self._shapes[name]) for name, value in self._named()}
        for name, value in self._named():
            for key, moment in self._moments(value).items():
                layout[f"moment/{key}/{name}"] = (moment.dtype, self._shapes[name] if moment.ndim else ())
        return layout

    def saved_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, then moments, each whole and on the CPU of rank 0, which alone looks; made when asked for.

        Cost: one tensor. Collective: all ranks iterate to the end.
        """

        def on_cpu(tensor: Tensor) -> Tensor:
            return tensor.cpu() if self.world.is_main else tensor

        for name, value in self._named():
            yield f"param/{name}", on_cpu(self._whole(value, None))
        for name, value in self._named():
            for key, moment in self._moments(value).items():
                yield f"moment/{key}/{name}", on_cpu(self._whole(value, key) if moment.ndim else moment)

    def load(self, read: Callable[[str], Tensor], names: Collection[str]) -> None:
        """Take over parameters and moments, to the bit.

        Args:
            read: gives a tensor, whole and on the CPU, by its name in the checkpoint.
            names: of all that the checkpoint holds.

        Cost: one tensor. Collective: all ranks.
        """
        values = dict(self._named())
        self.optimizer.state.clear()
        with torch.no_grad():
            for name, value in values.items():
                self._put(value, None, read(f"param/{name}"))
            for full_name in names:
                kind, _, rest = full_name.partition("/")
                if kind == "moment":
                    key, _, name = rest.partition("/")
                    self._put(values[name], key, read(full_name))

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        return zip(self.model.names, self.model.values, strict=True)

    def _wrap(self) -> None:
        """Make ``_wrapped``, which computes as the model does."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Free the gradient of the step before."""

    def _backward(self, loss: Tensor) -> None:
        """Differentiate, and reduce over the ranks."""
        raise NotImplementedError

    def _moments(self, value: Tensor) -> dict[str, Tensor]:
        """The optimizer's state of a parameter by key in order, as it lies here; empty before the first step."""
        return in_order(self.optimizer.state.get(value, {}))

    def _whole(self, value: Tensor, key: str | None) -> Tensor:
        """A parameter, or its moment ``key`` (at rank 0); collective where ranks hold parts of it."""
        return (value if key is None else self.optimizer.state[value][key]).detach()

    def _put(self, value: Tensor, key: str | None, whole: Tensor) -> None:
        """Set a parameter, or its moment ``key``, where it lies; collective as :meth:`_whole`."""
        if key is None:
            value.copy_(whole)
        else:  # as torch would put it: a step count stays on the CPU
            self.optimizer.state[value][key] = whole if key == "step" else whole.to(value.device)


class DataParallel(Carrier):
    """Every rank holds all parameters; DDP averages the meta-gradient (on one process there is nothing to average).

    Arguments as of :class:`Carrier`.
    """

    def _wrap(self) -> None:
        with warnings.catch_warnings():
            # Newer torch has another name for it, older has only this one; Accelerate knows only this one too.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self._wrapped = self.world.accelerator.prepare_model(self.model)

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: Tensor) -> None:
        self.world.accelerator.backward(loss)

    def apply(self, lr: float, clip_norm: float | None) -> tuple[float, bool]:
        norm = global_norm(p.grad for p in self.model.values if p.grad is not None)
        if not math.isfinite(norm):
            return norm, False
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.values, clip_norm, torch.tensor(norm, dtype=torch.float64))
        set_rate(self.optimizer, lr)
        self.optimizer.step()
        return norm, True


def in_order(state: dict[str, Any]) -> dict[str, Tensor]:
    """A parameter's state in a torch optimizer, by key in order, without what is not there yet."""
    return {key: torch.as_tensor(state[key]) for key in sorted(state) if state[key] is not None}


def global_norm(tensors: Iterable[Tensor]) -> float:
    """L2 norm over all tensors, which share a device; not finite where an element is not.

    Each tensor's own norm counts by itself, and they are added in float64 one after the other: a tensor of zeros (phi's
    gradient at gamma 0) changes no bit, which it would in a sum over vectors of norms.
    """
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return math.hypot(*torch.stack(norms).tolist()) if norms else 0.0
