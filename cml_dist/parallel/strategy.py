"""Carry the meta-gradient: one forward, one backward and one reduction a meta-step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from cml_dist.meta.model import MetaModel
from cml_dist.parallel.world import World
from cml_dist.types import Episode, Params


class DataParallel:
    """Every rank holds all parameters; DDP averages the meta-gradient (on one process there is nothing to average).

    Args:
        world: the processes.
        model: this rank's :class:`MetaModel`; rank 0's values win.
        optimizer: on ``model.values``.
    """

    def __init__(self, world: World, model: MetaModel, optimizer: torch.optim.Optimizer) -> None:
        self.world = world
        self.model = model.to(world.device)
        self.optimizer = optimizer
        with warnings.catch_warnings():
            # Newer torch has another name for it, older has only this one; Accelerate knows only this one too.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self._wrapped = world.accelerator.prepare_model(self.model)

    def gradient(
        self, episodes: Iterable[Episode], num_global: int, diagnose: frozenset[int] = frozenset()
    ) -> dict[str, Tensor]:
        """Put the mean meta-gradient of all ranks' episodes into ``.grad``; return this rank's sums of terms.

        Args:
            episodes: this rank's share (may be empty).
            num_global: episodes of the meta-step over all ranks. The wrapper averages over ranks, so each episode
                weighs N / num_global: exact also where N does not divide num_global.

        Collective: all ranks.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss, sums = self._wrapped(episodes, self.world.size / num_global, diagnose)
        self.world.accelerator.backward(loss)
        return sums

    def apply(self, lr: float, clip_norm: float | None) -> tuple[float, bool]:
        """One outer step with the gradient in ``.grad``; skipped, on all ranks alike, where it is not finite.

        Returns:
            (global L2 norm before clipping, whether the step was taken).
        """
        grads = [p.grad for p in self.model.values if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            return norm.item(), False
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.values, clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return norm.item(), True

    def params(self) -> Params:
        """All meta-parameters by canonical name, whole, on this device."""
        return self.model.params()

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as ``key/canonical name`` -> tensor."""
        state = {}
        for name, value in zip(self.model.names, self.model.values, strict=True):
            for key, moment in self.optimizer.state.get(value, {}).items():
                if moment is not None:
                    state[f"{key}/{name}"] = torch.as_tensor(moment)
        return state

    def load(self, params: Params, moments: dict[str, Tensor]) -> None:
        """Take over parameters and moments by canonical name."""
        with torch.no_grad():
            for name, value in zip(self.model.names, self.model.values, strict=True):
                value.copy_(params[name])
        numbers = {name: number for number, name in enumerate(self._optimizer_order())}
        state: dict[int, dict[str, Tensor]] = {}
        for key_and_name, moment in moments.items():
            key, _, name = key_and_name.partition("/")
            state.setdefault(numbers[name], {})[key] = moment.clone()
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _optimizer_order(self) -> list[str]:
        """Canonical names in the order in which the optimizer numbers its parameters."""
        names = {id(value): name for name, value in zip(self.model.names, self.model.values, strict=True)}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
