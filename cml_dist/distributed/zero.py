"""ZeRO: DeepSpeed shares out optimizer state, gradients and parameters; the meta-gradient is the same.

DeepSpeed comes through Accelerate, and sees an ordinary module with one forward and one backward a meta-step (see
:class:`MetaModel`). torch's own optimizer steps on this rank's partitions. What is saved is read from the partitions by
one map, :meth:`Zero._pieces`, which alone knows how DeepSpeed lays them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cml_dist.config.plan import RunPlan
from cml_dist.config.schema import RunConfig
from cml_dist.distributed.optim import build_optimizer
from cml_dist.distributed.strategy import Carrier, DataParallel
from cml_dist.distributed.world import World
from cml_dist.meta.model import MetaModel
from cml_dist.types import Layout, Params


class Piece(NamedTuple):
    """This rank's part of one parameter, inside a flat float32 partition that the optimizer updates.

    Attributes:
        flat: the partition; the optimizer's state of it has its shape.
        at: where the piece begins in ``flat``.
        begin, count: which elements of the whole, flattened parameter it holds.
    """

    flat: Tensor
    at: int
    begin: int
    count: int


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
        if self._stage < 3:
            return self.model.params()
        return {name: self._whole(value).to(self.world.device) for name, value in self._named()}

    def saved_layout(self) -> Layout:
        """Type and shape of all that :meth:`saved_tensors` will give, in its order. Collective: none."""
        layout: Layout = {f"param/{name}": (value.dtype, self._shapes[name]) for name, value in self._named()}
        state = self._state()
        for name, _ in self._named():
            for key in sorted(state):
                dtype, is_scalar = state[key]
                layout[f"moment/{key}/{name}"] = (dtype, () if is_scalar else self._shapes[name])
        return layout

    def saved_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, then moments, whole and on the CPU at rank 0 (empty elsewhere), made when asked for.

        Cost: one tensor. Collective: all ranks iterate to the end.
        """
        for name, value in self._named():
            yield f"param/{name}", self._gather(name, value, None)
        state = self._state()
        for name, value in self._named():
            for key in sorted(state):
                if state[key][1]:
                    yield f"moment/{key}/{name}", self._step_count(key).clone()
                else:
                    yield f"moment/{key}/{name}", self._gather(name, value, key)

    def load(self, read: Callable[[str], Tensor], names: Collection[str]) -> None:
        """Take over parameters and moments, to the bit; see :meth:`DataParallel.load`.

        Cost: one tensor. Collective: none.
        """
        moments: dict[str, list[str]] = {}
        for full_name in names:
            kind, _, rest = full_name.partition("/")
            if kind == "moment":
                key, _, name = rest.partition("/")
                moments.setdefault(name, []).append(key)
        with torch.no_grad():
            for flat in self._flats():
                self._torch.state[flat] = {}
            for name, value in self._named():
                whole = read(f"param/{name}")
                self._put(value, whole)
                self._keep(self._pieces(value), whole, lambda flat: flat)
                for key in moments.get(name, ()):
                    moment = read(f"moment/{key}/{name}")
                    if moment.ndim == 0 and key == "step":
                        for flat in self._flats():  # one count for all: every step updates every parameter
                            self._torch.state[flat].setdefault(key, moment.clone())
                        continue

                    def place(flat: Tensor, key: str = key) -> Tensor:
                        return self._torch.state[flat][key]

                    for flat in self._flats():
                        if key not in self._torch.state[flat]:
                            self._torch.state[flat][key] = torch.zeros_like(flat, requires_grad=False)
                    self._keep(self._pieces(value), moment, place)

    # ------------------------------------------------------------------ DeepSpeed's layout

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        return zip(self.model.names, self.model.values, strict=True)

    def _flats(self) -> list[Tensor]:
        """The partitions that the optimizer updates on this rank."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _pieces(self, value: Tensor) -> list[Piece]:
        """This rank's part of a parameter: none or one piece."""
        if self._stage == 3:
            group, at, size = self._zero.grad_position[self._zero.get_param_id(value)]
            begin = min(self.world.rank * size, value.ds_numel)
            pieces = [Piece(self._flats()[group], at, begin, min(size, value.ds_numel - begin))]
        elif value._hp_mapping is None:
            pieces = []
        else:
            mapping = value._hp_mapping
            whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            pieces = [Piece(self._flats()[mapping.param_group_index], flat.start, whole.start, whole.numel)]
        return [piece for piece in pieces if piece.count > 0]

    def _state(self) -> dict[str, tuple[torch.dtype, bool]]:
        """By key of the optimizer's state: its type, and whether it is one number a parameter. Empty before a step."""
        flat = self._flats()[0]
        return {
            key: (torch.as_tensor(moment).dtype, torch.as_tensor(moment).ndim == 0)
            for key, moment in self._torch.state.get(flat, {}).items()
            if moment is not None
        }

    def _step_count(self, key: str) -> Tensor:
        return torch.as_tensor(self._torch.state[self._flats()[0]][key]).cpu()

    def _gather(self, name: str, value: Tensor, key: str | None) -> Tensor:
        """The whole parameter, or its moment ``key``, on rank 0's CPU."""
        sources = [
            (piece, piece.flat.detach() if key is None else self._torch.state[piece.flat][key])
            for piece in self._pieces(value)
        ]
        dtype = self._flats()[0].dtype
        whole = torch.zeros(math.prod(self._shapes[name]), dtype=dtype, device=self.world.device)
        for piece, source in sources:
            whole[piece.begin : piece.begin + piece.count] = source[piece.at : piece.at + piece.count]
        if self.world.size > 1:
            # Summed as whole numbers: each bit pattern meets zeros alone, so that -0.0 and NaN survive too.
            torch.distributed.reduce(whole.view(torch.int32), dst=0)
        if not self.world.is_main:
            return torch.empty(0, dtype=dtype)
        return whole.view(self._shapes[name]).cpu()

    def _whole(self, value: Tensor) -> Tensor:
        """A parameter of ZeRO-3, whole, on every rank."""
        size = value.partition_numel()
        mine = torch.zeros(size, dtype=value.dtype, device=self.world.device)
        for piece in self._pieces(value):
            mine[: piece.count] = piece.flat.detach()[piece.at : piece.at + piece.count]
        parts = torch.empty(size * self.world.size, dtype=value.dtype, device=self.world.device)
        torch.distributed.all_gather_into_tensor(parts, mine)
        return parts[: value.ds_numel].view(value.ds_shape).clone()

    def _put(self, value: Tensor, whole: Tensor) -> None:
        """Set the parameter that the next forward uses (the optimizer's partition is set by :meth:`_keep`)."""
        if self._stage < 3:
            value.data.copy_(whole)
            return
        if value.data.numel() == value.ds_numel:  # a small one, which DeepSpeed keeps whole
            value.data.copy_(whole.view(value.ds_shape))
        size = value.partition_numel()
        begin = min(self.world.rank * size, value.ds_numel)
        mine = whole.reshape(-1)[begin : begin + size]
        value.ds_tensor.data[: mine.numel()].copy_(mine)

    @staticmethod
    def _keep(pieces: list[Piece], whole: Tensor, place: Callable[[Tensor], Tensor]) -> None:
        """Copy this rank's part of a whole tensor to where it belongs."""
        for piece in pieces:
            part = whole.reshape(-1)[piece.begin : piece.begin + piece.count]
            place(piece.flat)[piece.at : piece.at + piece.count].copy_(part)


def build_strategy(config: RunConfig, plan: RunPlan, world: World, model: MetaModel) -> DataParallel | Zero:
    """Who carries the meta-gradient, as the plan says, with the configured optimizer. Collective: all ranks."""
    optimizer = build_optimizer(config.optim, model)
    if plan.strategy in ("single", "ddp"):
        return DataParallel(world, model, optimizer)
    return (ZeroReplicated if plan.strategy == "zero0" else Zero)(world, model, optimizer)
