"""ZeRO: DeepSpeed shares out optimizer state, gradients and parameters; the meta-gradient is the same.

DeepSpeed comes through Accelerate, and sees an ordinary module with one forward and one backward a meta-step (see
:class:`MetaModel`). torch's own optimizer steps on this rank's partitions. What is saved and loaded goes
tensor by tensor, through DeepSpeed's public helpers where they are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.optim import build_optimizer
from cml_dist.distributed.strategy import Carrier, DataParallel
from cml_dist.distributed.world import World
from cml_dist.meta.model import MetaModel
from cml_dist.types import Layout, Params


class ZeroReplicated(DataParallel):
    """ZeRO-0: DeepSpeed's engine with nothing shared out; it averages the gradients as DDP does."""

    def _wrap(self) -> None:
        self._wrapped, _ = self.world.accelerator.prepare(self.model, self.optimizer)

    def _backward(self, loss: Tensor) -> None:
        self._wrapped.backward(loss)  # reduces, and takes no step


class Zero(Carrier):
    """ZeRO-1, 2 and 3, with offload: each rank keeps and updates a part of all parameters.

    The interface of :class:`DataParallel`; what differs is said here.

    Args:
        world: the processes, joined for DeepSpeed.
        model: this rank's :class:`MetaModel`; rank 0's values win.
        optimizer: on ``model.values``; DeepSpeed puts its partitions in their place.
    """

    def _wrap(self) -> None:
        import deepspeed  # an optional package, which joining the world has imported by now

        self._help, self._gathered = deepspeed.utils, deepspeed.zero.GatheredParameters
        self._shapes = {n: tuple(p.shape) for n, p in self._named()}
        self._wrapped, _ = self.world.accelerator.prepare(self.model, self.optimizer)
        self._zero = self._wrapped.optimizer
        self._stage = self._wrapped.zero_optimization_stage()
        self._torch: torch.optim.Optimizer = self._zero.optimizer
        if type(self._torch) is not type(self.optimizer):
            raise AssertionError(f"DeepSpeed runs {type(self._torch)} instead of {type(self.optimizer)}")

    def _backward(self, loss: Tensor) -> None:
        self._wrapped.backward(loss)  # DeepSpeed clears its partitions itself, after each step

    def apply(self, lr: float, clip_norm: float | None) -> tuple[float, bool]:
        """One outer step; skipped, on all ranks alike, where the gradient is not finite.

        DeepSpeed takes the norm of the averaged gradient over all ranks, leaves out the step where it is not finite
        (its sentinel), and scales by torch's formula, clip / (norm + 1e-6).

        Returns:
            (global L2 norm before clipping, whether the step was taken).
        """
        self._zero.clip_grad = clip_norm or 0.0
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._wrapped.step()
        taken = self._wrapped.was_step_applied()
        norm = float(self._wrapped.get_global_grad_norm())
        if taken != math.isfinite(norm):
            raise AssertionError(f"DeepSpeed's norm is {norm}, but the step was {'taken' if taken else 'skipped'}")
        return norm, taken

    def params(self) -> Params:
        """All meta-parameters by canonical name, whole, on this device. Collective under ZeRO-3: all ranks."""
        return {name: self._param(value).to(self.world.device) for name, value in self._named()}

    def saved_layout(self) -> Layout:
        """Type and shape of all that :meth:`saved_tensors` will give, in its order. Collective: none."""
        layout: Layout = {f"param/{name}": (value.dtype, self._shapes[name]) for name, value in self._named()}
        state = self._state()
        for name, _ in self._named():
            for key, moment in state.items():
                layout[f"moment/{key}/{name}"] = (moment.dtype, self._shapes[name] if moment.ndim else ())
        return layout

    def saved_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, then moments, whole and on the CPU, made when asked for.

        Cost: one tensor. Collective: all ranks iterate to the end.
        """
        for name, value in self._named():
            yield f"param/{name}", self._param(value).cpu()
        state = self._state()
        for name, value in self._named():
            for key, moment in state.items():
                whole = self._moment(value, key) if moment.ndim else moment.clone()
                yield f"moment/{key}/{name}", whole.cpu()

    def load(self, read: Callable[[str], Tensor], names: Collection[str]) -> None:
        """Take over parameters and moments, to the bit; see :meth:`DataParallel.load`.

        Cost: one tensor. Collective: all ranks.
        """
        values = dict(self._named())
        for name, value in values.items():
            self._set(value, read(f"param/{name}"), None)
        self._torch.state.clear()
        for full_name in names:
            kind, _, rest = full_name.partition("/")
            if kind == "moment":
                key, _, name = rest.partition("/")
                moment = read(full_name)
                for flat in self._flats():
                    if key not in self._torch.state[flat]:  # one step count for all: every step updates every parameter
                        made = moment.clone() if key == "step" else torch.zeros_like(flat, requires_grad=False)
                        self._torch.state[flat][key] = made
                if key != "step":
                    self._set(values[name], moment, key)

    # ------------------------------------------------------------------ DeepSpeed's layout

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        return zip(self.model.names, self.model.values, strict=True)

    def _flats(self) -> list[Tensor]:
        """The partitions that the optimizer updates on this rank."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _state(self) -> dict[str, Tensor]:
        """The optimizer's state of one partition, by key in order; empty before the first step."""
        state = self._torch.state.get(self._flats()[0], {})
        return {key: torch.as_tensor(state[key]) for key in sorted(state) if state[key] is not None}

    def _param(self, value: Tensor) -> Tensor:
        """A parameter, whole, on every rank; collective under ZeRO-3."""
        return self._help.safe_get_full_fp32_param(value) if self._stage == 3 else value.detach()

    def _moment(self, value: Tensor, key: str) -> Tensor:
        """The moment ``key`` of a parameter, whole, on every rank; collective."""
        if self._stage == 3:
            return self._help.safe_get_full_optimizer_state(value, key)
        whole = torch.zeros(value.numel(), dtype=value.dtype, device=value.device)
        at, part = self._part(value, key)
        whole[at] = part
        # Summed as whole numbers: each bit pattern meets zeros alone, so that -0.0 survives too.
        torch.distributed.all_reduce(whole.view(torch.int32))
        return whole.view_as(value)

    def _part(self, value: Tensor, key: str | None) -> tuple[slice, Tensor]:
        """ZeRO-1 and 2: which elements of a flattened parameter, or moment, are this rank's (none, maybe), and they.

        DeepSpeed's helpers (0.19.8) do not serve: after the first step they know the moments of the first parameter
        group alone, and they sum in float32, in which -0.0 is lost.
        """
        mine = value._hp_mapping
        if mine is None:
            return slice(0), torch.empty(0)
        whole, flat = mine.lp_fragment_address, mine.hp_fragment_address
        partition = self._flats()[mine.param_group_index]
        held = partition.data if key is None else self._torch.state[partition][key]
        return slice(whole.start, whole.start + whole.numel), held[flat.start : flat.start + flat.numel]

    def _set(self, value: Tensor, whole: Tensor, key: str | None) -> None:
        """Set a parameter, or its moment ``key``, where it lies; parameters under ZeRO-3 are collective."""
        if self._stage < 3:
            at, part = self._part(value, key)
            part.copy_(whole.flatten()[at])
            if key is None:
                value.data.copy_(whole)  # which the next forward uses
            return
        # Not DeepSpeed's helpers for the whole, which take no parameter that the ranks cannot share out evenly.
        size = value.partition_numel()
        padded = torch.nn.functional.pad(whole.flatten(), (0, size * self.world.size - whole.numel()))
        mine = padded[self.world.rank * size :][:size]
        if key is not None:
            self._help.safe_set_local_optimizer_state(value, mine, key)
            return
        self._help.safe_set_local_fp32_param(value, mine)
        with self._gathered([value], modifier_rank=0):  # which the next forward uses
            value.data.copy_(whole)


def build_strategy(config: RunConfig, plan: RunPlan, world: World, model: MetaModel) -> DataParallel | Zero:
    """Who carries the meta-gradient, as the plan says, with the configured optimizer. Collective: all ranks."""
    optimizer = build_optimizer(config.optim, model)
    if plan.strategy in ("single", "ddp"):
        return DataParallel(world, model, optimizer)
    return (ZeroReplicated if plan.strategy == "zero0" else Zero)(world, model, optimizer)
