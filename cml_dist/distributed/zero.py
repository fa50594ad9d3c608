"""ZeRO: DeepSpeed shares out optimizer state, gradients and parameters; the meta-gradient is the same.

DeepSpeed comes through Accelerate, and sees an ordinary module with one forward and one backward a meta-step (see
:class:`MetaModel`). torch's own optimizer steps on this rank's partitions. Parameters and moments are read and set
through DeepSpeed's public helpers, where they are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.optim import build_optimizer, set_rate
from cml_dist.distributed.strategy import Carrier, DataParallel, in_order
from cml_dist.distributed.world import World
from cml_dist.meta.model import MetaModel


class ZeroReplicated(DataParallel):
    """ZeRO-0: DeepSpeed's engine with nothing shared out; it averages the gradients as DDP does."""

    def _wrap(self) -> None:
        self._wrapped, _ = self.world.accelerator.prepare(self.model, self.optimizer)

    def _backward(self, loss: Tensor) -> None:
        self._wrapped.backward(loss)  # reduces, and takes no step


class Zero(Carrier):
    """ZeRO-1, 2 and 3, with offload: each rank keeps and updates a part of all parameters. Arguments as of Carrier."""

    def _wrap(self) -> None:
        import deepspeed  # an optional package, which joining the world has imported by now

        self._help, self._gathered = deepspeed.utils, deepspeed.zero.GatheredParameters
        self._wrapped, _ = self.world.accelerator.prepare(self.model, self.optimizer)
        self._zero, self._stage = self._wrapped.optimizer, self._wrapped.zero_optimization_stage()
        if type(self._zero.optimizer) is not type(self.optimizer):
            raise AssertionError(f"DeepSpeed runs {type(self._zero.optimizer)} instead of {type(self.optimizer)}")
        self.optimizer = self._zero.optimizer  # on this rank's partitions

    def _backward(self, loss: Tensor) -> None:
        self._wrapped.backward(loss)  # DeepSpeed clears its partitions itself, after each step

    def apply(self, lr: float, clip_norm: float | None) -> tuple[float, bool]:
        # DeepSpeed takes the norm of the averaged gradient over all ranks, leaves out the step where it is not finite
        # (its sentinel), and scales by torch's formula, clip / (norm + 1e-6).
        self._zero.clip_grad = clip_norm or 0.0
        set_rate(self.optimizer, lr)
        self._wrapped.step()
        taken = self._wrapped.was_step_applied()
        norm = float(self._wrapped.get_global_grad_norm())
        if taken != math.isfinite(norm):
            raise AssertionError(f"DeepSpeed's norm is {norm}, but the step was {'taken' if taken else 'skipped'}")
        return norm, taken

    def _flats(self) -> list[Tensor]:
        """The partitions that the optimizer updates on this rank."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _moments(self, value: Tensor) -> dict[str, Tensor]:
        return in_order(self.optimizer.state.get(self._flats()[0], {}))  # all partitions have the same ones

    def _whole(self, value: Tensor, key: str | None) -> Tensor:
        if self._stage == 3:
            helper = self._help
            return helper.safe_get_full_optimizer_state(value, key) if key else helper.safe_get_full_fp32_param(value)
        if key is None:
            return value.detach()
        whole = torch.zeros(value.numel(), dtype=value.dtype, device=value.device)
        at, part = self._part(value, key)
        whole[at] = part
        # Summed as whole numbers: each bit pattern meets zeros alone, so that -0.0 survives too.
        torch.distributed.reduce(whole.view(torch.int32), dst=0)
        return whole.view_as(value)

    def _put(self, value: Tensor, key: str | None, whole: Tensor) -> None:
        for flat in self._flats() if key is not None else ():
            if key not in self.optimizer.state[flat]:
                made = whole.clone() if key == "step" else torch.zeros_like(flat, requires_grad=False)
                self.optimizer.state[flat][key] = made
        if key == "step":  # one count for all: every step updates every parameter
            return
        if self._stage < 3:
            at, part = self._part(value, key)
            part.copy_(whole.flatten()[at])
            if key is None:
                value.copy_(whole)  # which the next forward uses
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
            value.copy_(whole)

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
        held = partition.data if key is None else self.optimizer.state[partition][key]
        return slice(whole.start, whole.start + whole.numel), held[flat.start : flat.start + flat.numel]


def build_strategy(config: RunConfig, plan: RunPlan, world: World, model: MetaModel) -> DataParallel | Zero:
    """Who carries the meta-gradient, as the plan says, with the configured optimizer. Collective: all ranks."""
    optimizer = build_optimizer(config.optim, model)
    if plan.strategy in ("single", "ddp"):
        return DataParallel(world, model, optimizer)
    return (ZeroReplicated if plan.strategy == "zero0" else Zero)(world, model, optimizer)
