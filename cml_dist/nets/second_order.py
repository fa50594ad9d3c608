"""Convolution, batch norm and 2x2 max-pool with first and second derivatives written out.

torch's own have second derivatives too, but slow ones: of a batch norm some forty passes over the maps, of a
convolution's weight a kernel as large as an image. The functions and their gradients are the same to rounding, the
max-pool's to the bit. A third derivative is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cml_dist.meta.compiled import is_traced

aten = torch.ops.aten


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``; the same arguments."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.convolved(inputs, self.bias)

    def convolved(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        if not _is_plain(inputs, self.weight) or isinstance(self.padding, str) or self.padding_mode != "zeros":
            return self._conv_forward(inputs, self.weight, bias)
        how = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
        return _Conv.apply(inputs, self.weight, bias, how)


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``; the same arguments."""

    def forward(self, inputs: Tensor) -> Tensor:
        by_batch = self.running_mean is None and self.affine and inputs.numel() > inputs.shape[1]
        if not by_batch or not _is_plain(inputs, self.weight):
            return super().forward(inputs)
        return _BatchNorm.apply(inputs, self.weight, self.bias, self.eps)


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d``; the same arguments."""

    def forward(self, inputs: Tensor) -> Tensor:
        how = [self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices]
        return max_pool(inputs) if how == [2, 2, 0, 1, False, False] else super().forward(inputs)


def max_pool(maps: Tensor) -> Tensor:
    """The largest of each 2x2 square (its first, where several are): ``[N, C, H, W]`` to ``[N, C, H // 2, W // 2]``."""
    return (_MaskedMaxPool if is_traced() and _lies_channels_last(maps) else _MaxPool).apply(maps)


WRITTEN_OUT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Conv2d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.MaxPool2d: MaxPool2d,
}
"""By torch's module."""


def _is_plain(inputs: Tensor, weight: Tensor) -> bool:
    """Whether nothing is to be cast: autocast does that for torch's own functions alone."""
    device = inputs.device.type
    casts = device != "meta" and torch.is_autocast_enabled(device)
    return inputs.ndim == 4 and inputs.dtype == weight.dtype and not casts


# --------------------------------------------------------------------------- convolution


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return aten.convolution(x, weight, bias, *how)

    @staticmethod
    def backward(ctx, g: Tensor):
        return *_ConvBackward.apply(g, *ctx.saved_tensors, ctx.how, ctx.needs_input_grad[:3]), None


class _ConvBackward(torch.autograd.Function):
    """(g, x, weight) -> gradients of x, weight and bias: sums of products, linear in each of the three."""

    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor, weight: Tensor, how: tuple, needed: tuple[bool, bool, bool]):
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return aten.convolution_backward(g, x, weight, [len(weight)], *how, needed)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_x: Tensor | None, by_weight: Tensor | None, by_bias: Tensor | None):
        (g, x, weight), how = ctx.saved_tensors, ctx.how
        of_g = of_x = of_weight = None
        if by_x is not None and by_weight is not None and how[-1] == 1:  # one kernel instead of two
            of_g = aten.convolution(torch.cat([by_x, x], 1), torch.cat([weight, by_weight], 1), by_bias, *how)
            of_x, of_weight, _ = aten.convolution_backward(g, by_x, by_weight, None, *how, [True, True, False])
            return of_g, of_x, of_weight, None, None
        if by_x is not None:
            of_g = aten.convolution(by_x, weight, None, *how)
            of_weight = aten.convolution_backward(g, by_x, weight, None, *how, [False, True, False])[1]
        if by_weight is not None:
            further = aten.convolution(x, by_weight, None, *how)
            of_g = further if of_g is None else of_g.add_(further)
            if ctx.needs_input_grad[1]:
                of_x = aten.convolution_backward(g, x, by_weight, None, *how, [True, False, False])[0]
        if by_bias is not None:
            of_g = by_bias[:, None, None].expand_as(g) if of_g is None else of_g.add_(by_bias[:, None, None])
        return of_g, of_x, of_weight, None, None


# --------------------------------------------------------------------------- batch norm


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        if is_traced():
            n = x.numel() // x.shape[1]
            mean = _sum(x) / n
            var = _sum((x - _channel(mean)).square()) / n
            inv = (var + eps).rsqrt()
            out = torch.addcmul(_channel(bias - mean * inv * weight), x, _channel(inv * weight))
        elif _lies_channels_last(x) and x.device.type == "cpu":
            mean, var = _mean_and_var(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]))
            out, inv = aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0], (var + eps).rsqrt()
        else:
            out, mean, inv = aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, inv)
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        return *_BatchNormBackward.apply(g, *ctx.saved_tensors), None


class _BatchNormBackward(torch.autograd.Function):
    """(g, x, weight) -> gradients of x, weight and bias, with z = (x - mean) inv and means m over a channel's n values:

    d x = weight inv (g - m(g) - z m(g z)),  d weight = n m(g z),  d bias = n m(g).

    Its own derivative, for v, v_weight and v_bias on these, follows from d z and d inv = -inv^2 z / n for each x.
    """

    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inv: Tensor):
        of_x, of_weight, of_bias = _batch_norm_backward(g, x, weight, mean, inv)
        ctx.save_for_backward(g, x, weight, mean, inv, of_weight, of_bias)
        ctx.set_materialize_grads(False)
        return of_x, of_weight, of_bias

    @staticmethod
    @once_differentiable
    def backward(ctx, v: Tensor | None, v_weight: Tensor | None, v_bias: Tensor | None):
        g, x, weight, mean, inv, sum_gz, sum_g = ctx.saved_tensors
        v_weight = torch.zeros_like(weight) if v_weight is None else v_weight
        v_bias = torch.zeros_like(weight) if v_bias is None else v_bias
        v_inv = v_weight * inv
        through_weight, through_bias = _channel(v_inv), _channel(v_bias - v_inv * mean)
        if v is None:
            of_x = _batch_norm_backward(g, x, v_weight, mean, inv, [True, False, False])[0]
            return torch.addcmul(through_bias, x, through_weight), of_x, None, None, None
        n = x.numel() // x.shape[1]
        of_g, sum_vz, sum_v = _batch_norm_backward(v, x, weight, mean, inv)
        of_g = of_g.addcmul_(x, through_weight).add_(through_bias)
        zero, one = torch.zeros_like(mean), torch.ones_like(inv)
        sum_vg = _batch_norm_backward(v, g, None, zero, one, [False, True, False])[1]
        m_g, m_gz, m_v, m_vz = sum_g / n, sum_gz / n, sum_v / n, sum_vz / n
        covariance = sum_vg - n * (m_g * m_v + m_gz * m_vz)
        # What reaches z is p g + q v.
        p, q = v_weight - weight * inv * m_vz, -weight * inv * m_gz
        by_z = inv * (p * m_gz + q * m_vz) + weight * covariance * inv.square() / n
        constant = by_z * inv * mean - inv * (p * m_g + q * m_v)
        of_x = torch.addcmul(_channel(constant), x, _channel(-by_z * inv))
        of_x = of_x.addcmul_(g, _channel(inv * p)).addcmul_(v, _channel(inv * q))
        return of_g, of_x, inv * covariance, None, None


def _batch_norm_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inv: Tensor, wanted: Sequence[bool] = (True, True, True)
) -> tuple[Tensor, Tensor, Tensor]:
    """weight inv (g - m(g) - z m(g z)), sum(g z), sum(g)."""
    if is_traced():
        n, z = x.numel() // x.shape[1], (x - _channel(mean)) * _channel(inv)
        sum_gz, sum_g = _sum(g * z), _sum(g)
        factor = inv if weight is None else weight * inv
        return _channel(factor) * (g - _channel(sum_g / n) - z * _channel(sum_gz / n)), sum_gz, sum_g
    return aten.native_batch_norm_backward(g, x, weight, None, None, mean, inv, True, 0.0, wanted)


def _mean_and_var(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column of ``[n, C]``, in float32 to 1e-7.

    torch's batch norm of maps that lie channels last adds up row by row, to 1e-5, and the ReLUs and maxima that this
    switches move a meta-gradient by a percent.
    """
    mean, squares = rows.mean(0), torch.zeros_like(rows[0])
    for part in rows.split(4096):  # which stays in the cache
        squares += (part - mean).square_().sum(0)
    return mean, squares / len(rows)


def _sum(maps: Tensor) -> Tensor:
    """Of each channel, image by image: a compiler adds up one by one, and loses digits over all of them at once."""
    return maps.sum((2, 3)).sum(0)


def _lies_channels_last(maps: Tensor) -> bool:
    return maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()


def _channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


# --------------------------------------------------------------------------- max-pool


class _MaxPool(torch.autograd.Function):
    """Keeps where each maximum was, and not the maps."""

    @staticmethod
    def forward(ctx, maps: Tensor) -> Tensor:
        by_rows = maps.device.type == "cpu" and maps.is_contiguous()  # channels last, torch's is fast
        out, places = _halves(maps) if by_rows else aten.max_pool2d_with_indices(maps, [2, 2])
        ctx.save_for_backward(places)
        ctx.shape = maps.shape
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        return _MaxPoolBackward.apply(g, *ctx.saved_tensors, ctx.shape)


class _MaxPoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(places)
        maps = g.new_empty(1).expand(shape)  # of which shape and order in memory alone count
        if not places.is_contiguous():
            maps = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
        return aten.max_pool2d_with_indices_backward(g, maps, [2, 2], [2, 2], [0, 0], [1, 1], False, places)

    @staticmethod
    @once_differentiable
    def backward(ctx, v: Tensor):
        (places,) = ctx.saved_tensors
        return v.flatten(-2).gather(-1, places.flatten(-2)).view_as(places), None, None


def _halves(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The max-pool, and where in its ``[H, W]`` map each maximum was.

    Several times as fast as torch's on a CPU, unless channels lie last.

    The larger of two columns, then of two rows, the first where they are equal: the order in which torch looks too.
    """
    height, width = maps.shape[-2:]
    rows, columns = torch.arange(0, height - 1, 2), torch.arange(0, width - 1, 2)
    left, right = (maps[..., : 2 * len(rows), i : 2 * len(columns) : 2] for i in (0, 1))
    across, in_right = torch.maximum(left, right), right > left
    upper, lower = across[..., 0::2, :], across[..., 1::2, :]
    in_lower = lower > upper
    of_upper, of_lower = in_right[..., 0::2, :], in_right[..., 1::2, :]
    column = of_upper ^ (in_lower & (of_upper ^ of_lower))  # torch.where takes ten times as long for bools
    places = torch.add(rows[:, None] * width + columns, in_lower.long(), alpha=width).add_(column.long())
    return torch.maximum(upper, lower), places


class _MaskedMaxPool(torch.autograd.Function):
    """The same of maps that lie channels last, element by element: keeps in which row and column each maximum was."""

    @staticmethod
    def forward(ctx, maps: Tensor) -> Tensor:
        (one, two), (three, four) = _squares(maps)
        upper, lower = torch.maximum(one, two), torch.maximum(three, four)
        in_lower = lower > upper
        ctx.save_for_backward(in_lower, torch.where(in_lower, four > three, two > one))
        ctx.shape = maps.shape
        return torch.maximum(upper, lower)

    @staticmethod
    def backward(ctx, g: Tensor):
        return _MaskedMaxPoolBackward.apply(g, *ctx.saved_tensors, ctx.shape)


class _MaskedMaxPoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g: Tensor, in_lower: Tensor, in_right: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(in_lower, in_right)
        batch, channels, height, width = shape
        second = torch.arange(2, device=g.device) > 0

        def spread(pooled: Tensor) -> Tensor:  # [N, h, 1, w, 1, C]
            return pooled.permute(0, 2, 3, 1)[:, :, None, :, None]

        chosen = (spread(in_lower) == second.view(2, 1, 1, 1)) & (spread(in_right) == second.view(2, 1))
        even = torch.where(chosen, spread(g), 0).view(batch, height // 2 * 2, width // 2 * 2, channels)
        return F.pad(even.permute(0, 3, 1, 2), (0, width % 2, 0, height % 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, v: Tensor):
        in_lower, in_right = ctx.saved_tensors
        upper, lower = (torch.where(in_right, right, left) for left, right in _squares(v))
        return torch.where(in_lower, lower, upper), None, None, None


def _squares(maps: Tensor) -> list[list[Tensor]]:
    """The four elements of each 2x2 square, by row and column."""
    height, width = (side // 2 * 2 for side in maps.shape[-2:])
    return [[maps[..., i:height:2, j:width:2] for j in (0, 1)] for i in (0, 1)]
