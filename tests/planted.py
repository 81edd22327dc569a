"""Defects of RMSNorm kernels, each to be caught by the properties: in a kernel written out in torch, and in csrc."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from raw_kernels import Patch
from rmsnorm_properties import HALF, wide
from torch import Tensor

BLOCK = 8  # elements of a vector access


class Kernel:
    """RMSNorm as a kernel does it, step by step: rows from memory, lanes that each add 16 terms at most, a tree.

    A defect is a subclass that does one of the steps wrong.
    """

    def forward(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, total: Tensor, rstd: Tensor
    ) -> None:
        h = self.load(x)
        if residual is not None:
            h = self.add(h, self.load(residual))
            self.store(total, h)
        of_row = self.rstd(self.mean_of_squares(h, x), eps)
        self.store_rstd(rstd, of_row)
        self.store(y, self.normed(h.to(wide(h.dtype)), of_row[:, None], weight.to(wide(h.dtype)), h.dtype))

    def backward(
        self, dy: Tensor, h: Tensor, dsum: Tensor | None, weight: Tensor, rstd: Tensor, dx: Tensor, dweight: Tensor
    ) -> None:
        loaded, rstd = self.load(h), rstd.reshape(-1, 1)
        exact = wide(h.dtype)
        grad = self.load_dy(dy).to(exact)
        xhat = loaded.to(exact) * rstd
        found = self.dx(grad * weight.to(exact), xhat, rstd)
        if dsum is not None:
            found = self.add_dsum(found, self.load(dsum).to(exact))
        self.store(dx, found)
        self.store_dweight(dweight, self.sum_of_rows(grad * xhat, h.dtype))

    def load(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1])

    def load_dy(self, dy: Tensor) -> Tensor:
        return self.load(dy)

    def add(self, h: Tensor, residual: Tensor) -> Tensor:
        return h + residual

    def squares(self, h: Tensor) -> Tensor:
        return h.to(wide(h.dtype)).square()

    def mean_of_squares(self, h: Tensor, x: Tensor) -> Tensor:
        return self.row_sum(self.squares(h)) / h.shape[-1]

    def row_sum(self, terms: Tensor) -> Tensor:
        return tree(terms)

    def rstd(self, mean: Tensor, eps: float) -> Tensor:
        return 1 / torch.sqrt(mean + eps)

    def store_rstd(self, rstd: Tensor, value: Tensor) -> None:
        rstd.copy_(value.view(rstd.shape))

    def normed(self, h: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return h * rstd * weight

    def dx(self, g: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return rstd * (g - xhat * self.mean(g * xhat))

    def mean(self, terms: Tensor) -> Tensor:
        return (self.row_sum(terms) / terms.shape[-1])[:, None]

    def add_dsum(self, dx: Tensor, dsum: Tensor) -> Tensor:
        return dx + dsum

    def sum_of_rows(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        return tree(terms.T)

    def store(self, out: Tensor, value: Tensor) -> None:
        out.copy_(value.view(out.shape))

    def store_dweight(self, dweight: Tensor, value: Tensor) -> None:
        dweight.copy_(value)


def tree(terms: Tensor, run: int = 16) -> Tensor:
    """Sum of [rows, n] over n: 2^k lanes, of which each adds `run` terms at most, then by halves."""
    rows, n = terms.shape
    lanes = 1 << max(0, math.ceil(math.log2(max(n, 1) / run)))
    partial = torch.zeros(rows, lanes, dtype=terms.dtype, device=terms.device)
    for begin in range(0, n, lanes):
        part = terms[:, begin : begin + lanes]
        partial[:, : part.shape[1]] += part
    while lanes > 1:
        lanes //= 2
        partial = partial[:, :lanes] + partial[:, lanes:]
    return partial[:, 0]


def memory(tensor: Tensor, at: Tensor) -> Tensor:
    """Elements of a tensor's storage; NaN is what lies outside."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    whole = torch.cat([whole, whole.new_tensor([math.nan])])
    return whole[at.to(tensor.device).clamp(0, len(whole) - 1)]


def offsets(tensor: Tensor, row_stride: int, begin: int) -> Tensor:
    rows = torch.arange(tensor.numel() // tensor.shape[-1])[:, None]
    return begin + rows * row_stride + torch.arange(tensor.shape[-1])


def padded(hidden: int) -> int:
    return -(-hidden // BLOCK) * BLOCK


# --- memory ----------------------------------------------------------------------------------------------------------


class TailDropped(Kernel):
    def normed(self, h: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        y = super().normed(h, rstd, weight, dtype)
        y[:, h.shape[1] // BLOCK * BLOCK :] = 0
        return y


class TailOfSumDropped(Kernel):
    def row_sum(self, terms: Tensor) -> Tensor:
        whole = terms.shape[1] // BLOCK * BLOCK
        return tree(terms[:, :whole] if whole else terms)


class TailReadsOn(Kernel):
    """The last vector's mask is missing: it squares what follows the row."""

    def mean_of_squares(self, h: Tensor, x: Tensor) -> Tensor:
        extra = padded(h.shape[1]) - h.shape[1]
        flat = torch.cat([h.flatten(), h.new_zeros(extra)])
        after = flat[torch.arange(1, len(h) + 1)[:, None] * h.shape[1] + torch.arange(extra)]
        return self.row_sum(self.squares(torch.cat([h, after], 1))) / h.shape[1]


class RowOffsetWraps(Kernel):
    """At 2^15 elements, so that it shows in small tensors; as one in int32 does at 2^31."""

    def load(self, tensor: Tensor) -> Tensor:
        flat = super().load(tensor).contiguous()
        wrapped = (torch.arange(len(flat)) * flat.shape[1]) % (1 << 15)
        return flat.flatten()[wrapped[:, None] + torch.arange(flat.shape[1])]


class DyTakenForContiguous(Kernel):
    def load_dy(self, dy: Tensor) -> Tensor:
        return memory(dy, offsets(dy, dy.shape[-1], int(dy.storage_offset())))


class OffsetIgnored(Kernel):
    def load(self, tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            return memory(tensor, offsets(tensor, tensor.shape[-1], 0))
        return super().load(tensor)


class StrideIgnored(Kernel):
    def load(self, tensor: Tensor) -> Tensor:
        return memory(tensor, offsets(tensor, tensor.shape[-1], int(tensor.storage_offset())))


class OuterStrideIgnored(Kernel):
    """Rows are found by the last row stride alone, as if leading dims could always be merged."""

    def load(self, tensor: Tensor) -> Tensor:
        stride = tensor.stride(-2) if tensor.dim() > 1 else tensor.shape[-1]
        if tensor.stride(-1) != 1:
            return super().load(tensor)
        return memory(tensor, offsets(tensor, stride, int(tensor.storage_offset())))


class WritesWholeVectors(Kernel):
    """The last vector of the last row has no mask and ends behind the output."""

    def store(self, out: Tensor, value: Tensor) -> None:
        super().store(out, value)
        whole = torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage())
        end = out.storage_offset() + out.numel()
        if out.numel():
            whole[end : end + padded(value.shape[-1]) - value.shape[-1]] = 0


class LastRowUnwritten(Kernel):
    def store(self, out: Tensor, value: Tensor) -> None:
        if len(value) % 2 == 0 or len(value) == 1:
            return super().store(out, value)
        out.view(value.shape)[:-1].copy_(value[:-1])


class InputScaledInPlace(Kernel):
    def forward(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, total: Tensor, rstd: Tensor
    ) -> None:
        super().forward(x, residual, weight, eps, y, total, rstd)
        if x.is_contiguous() and x.numel():
            x.view(-1)[-1] = 0


class DyUsedAsScratch(Kernel):
    def backward(
        self, dy: Tensor, h: Tensor, dsum: Tensor | None, weight: Tensor, rstd: Tensor, dx: Tensor, dweight: Tensor
    ) -> None:
        super().backward(dy, h, dsum, weight, rstd, dx, dweight)
        if dy.is_contiguous():
            dy.mul_(2)


# --- numbers ---------------------------------------------------------------------------------------------------------


class EpsOutsideTheRoot(Kernel):
    def rstd(self, mean: Tensor, eps: float) -> Tensor:
        return 1 / (torch.sqrt(mean) + eps)


class EpsMissing(Kernel):
    def rstd(self, mean: Tensor, eps: float) -> Tensor:
        return 1 / torch.sqrt(mean)


class EpsInHalf(Kernel):
    def rstd(self, mean: Tensor, eps: float) -> Tensor:
        return super().rstd(mean, torch.tensor(eps).half().item())


class MeanOverPadding(Kernel):
    def mean_of_squares(self, h: Tensor, x: Tensor) -> Tensor:
        return self.row_sum(self.squares(h)) / padded(h.shape[1])


class SquaresInHalf(Kernel):
    def squares(self, h: Tensor) -> Tensor:
        return h.square().to(wide(h.dtype))


class SummedOneByOne(Kernel):
    def row_sum(self, terms: Tensor) -> Tensor:
        if not terms.numel():
            return terms.sum(-1)
        return torch.from_numpy(np.cumsum(terms.detach().cpu().numpy(), axis=1)[:, -1].copy()).to(terms.device)


class RoughRoot(Kernel):
    """rsqrt's estimate of 12 bits, without the Newton step."""

    def rstd(self, mean: Tensor, eps: float) -> Tensor:
        exact = super().rstd(mean, eps)
        return exact + exact * (2.0**-13)


class Truncated(Kernel):
    """Rounded towards zero: within an ulp, and half of the time not the nearest."""

    def store(self, out: Tensor, value: Tensor) -> None:
        if out.dtype == torch.bfloat16 and value.dtype == torch.float32:
            value = (value.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
        super().store(out, value)


class RoundedTwice(Kernel):
    """x rstd is rounded to the dtype before the weight comes."""

    def normed(self, h: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return (h * rstd).to(dtype).to(h.dtype) * weight


class WeightInHalf(Kernel):
    def normed(self, h: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return super().normed(h, rstd, weight.to(dtype).to(h.dtype), dtype)


class DenormalsFlushed(Kernel):
    def squares(self, h: Tensor) -> Tensor:
        return super().squares(flushed(h))

    def normed(self, h: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return super().normed(flushed(h), rstd, weight, dtype)


def flushed(value: Tensor) -> Tensor:
    return torch.where(value.abs() < torch.finfo(value.dtype).tiny, 0, value)


class OverflowRescued(Kernel):
    """In fp64, where the specification's squares are inf."""

    def mean_of_squares(self, h: Tensor, x: Tensor) -> Tensor:
        return tree(h.double().square()) / h.shape[1]

    def rstd(self, mean: Tensor, eps: float) -> Tensor:
        return (1 / torch.sqrt(mean + eps)).float()


class NanSwallowed(Kernel):
    """As a maximum does that returns the number of the two."""

    def squares(self, h: Tensor) -> Tensor:
        return super().squares(h).nan_to_num(0, math.inf)


class InfSaturates(Kernel):
    def store(self, out: Tensor, value: Tensor) -> None:
        most = torch.finfo(out.dtype).max
        super().store(out, value.clamp(-most, most).nan_to_num(0))


# --- rows and threads ------------------------------------------------------------------------------------------------


class BarrierMissing(Kernel):
    """The upper half of a tree's lanes still has what the row before left there."""

    def row_sum(self, terms: Tensor) -> Tensor:
        half = terms.shape[1] // 2
        if terms.shape[1] < 256 or not len(terms):
            return tree(terms)
        upper = tree(terms[:, half:])
        stale = torch.cat([torch.zeros_like(upper[:1]), upper[:-1]])
        return tree(terms[:, :half]) + stale


class SplitWhereRowsAreFew(Kernel):
    """A row's terms are added in another order when there are not enough rows for all multiprocessors."""

    def row_sum(self, terms: Tensor) -> Tensor:
        return tree(terms, run=16 if len(terms) > 2 else 4)


class OrderByAlignment(Kernel):
    def mean_of_squares(self, h: Tensor, x: Tensor) -> Tensor:
        squares = self.squares(h)
        return tree(squares, run=16 if x.data_ptr() % 16 == 0 else 4) / h.shape[1]


class OrderByThreads(Kernel):
    def sum_of_rows(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        return tree(terms.T, run=8 * torch.get_num_threads())


class Atomics(Kernel):
    """dweight's partial sums are added in the order in which they come."""

    def sum_of_rows(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        return tree(terms[torch.randperm(len(terms))].T)


class RstdOfTheFirstRow(Kernel):
    def store_rstd(self, rstd: Tensor, value: Tensor) -> None:
        super().store_rstd(rstd, value[:1].expand(value.shape))


class RstdInHalf(Kernel):
    def store_rstd(self, rstd: Tensor, value: Tensor) -> None:
        super().store_rstd(rstd, value.to(torch.bfloat16).to(value.dtype))


# --- gradients -------------------------------------------------------------------------------------------------------


class ProjectionMissing(Kernel):
    def dx(self, g: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        return rstd * g


class ProjectionOverPadding(Kernel):
    def mean(self, terms: Tensor) -> Tensor:
        return (self.row_sum(terms) / padded(terms.shape[1]))[:, None]


class RowLost(Kernel):
    """The last row of an odd number of rows adds nothing to dweight."""

    def sum_of_rows(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        return super().sum_of_rows(terms[: max(1, len(terms) // 2 * 2)], dtype)


class RowTwice(Kernel):
    """The last of many rows is in two partial sums."""

    def sum_of_rows(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        return super().sum_of_rows(torch.cat([terms, terms[-1:]]) if len(terms) > 64 else terms, dtype)


class RowsSummedInHalf(Kernel):
    def sum_of_rows(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        return tree(terms.to(dtype).T) if dtype in HALF else super().sum_of_rows(terms, dtype)


class DweightUnwrittenWithoutRows(Kernel):
    def store_dweight(self, dweight: Tensor, value: Tensor) -> None:
        super().store_dweight(dweight, value)
        if not value.any():
            dweight.fill_(math.nan)


class DsumIgnored(Kernel):
    def add_dsum(self, dx: Tensor, dsum: Tensor) -> Tensor:
        return dx


class DsumTwice(Kernel):
    def add_dsum(self, dx: Tensor, dsum: Tensor) -> Tensor:
        return dx + 2 * dsum


class SumNotRounded(Kernel):
    """y is of the exact sum, new_residual of the rounded one: the next layer sees another h."""

    def add(self, h: Tensor, residual: Tensor) -> Tensor:
        return h.to(wide(h.dtype)) + residual.to(wide(h.dtype))


class Planted(NamedTuple):
    kernel: type[Kernel]
    caught_by: tuple[str, ...]  # properties, each of which must fail


Y, GRADIENTS, WILD, GUARDS = "y is near", "gradients are near", "wild rows are as in fp32", "guards stay"
ALONE, LAYOUT, ADD = "rows are alone", "layout does not matter", "add is its composition"

PLANTED = [
    Planted(TailDropped, (Y,)),
    Planted(TailOfSumDropped, (Y, GRADIENTS)),
    Planted(TailReadsOn, (Y, ALONE)),
    Planted(RowOffsetWraps, (Y, GRADIENTS)),
    Planted(DyTakenForContiguous, (GRADIENTS, LAYOUT, "a sum has a gradient")),
    Planted(OffsetIgnored, (Y, LAYOUT)),
    Planted(StrideIgnored, (Y, LAYOUT)),
    Planted(OuterStrideIgnored, (Y, LAYOUT)),
    Planted(WritesWholeVectors, (GUARDS,)),
    Planted(LastRowUnwritten, (GUARDS,)),
    Planted(InputScaledInPlace, ("inputs stay",)),
    Planted(DyUsedAsScratch, ("inputs stay",)),
    Planted(EpsOutsideTheRoot, (Y, GRADIENTS)),
    Planted(EpsMissing, (Y,)),
    Planted(EpsInHalf, (Y,)),
    Planted(MeanOverPadding, (Y, GRADIENTS)),
    Planted(SquaresInHalf, (Y, WILD)),
    Planted(SummedOneByOne, (Y,)),
    Planted(RoughRoot, (Y,)),
    Planted(Truncated, ("half is rounded",)),
    Planted(RoundedTwice, ("half is rounded",)),
    Planted(WeightInHalf, ("half is rounded",)),
    Planted(DenormalsFlushed, (Y,)),
    Planted(OverflowRescued, (WILD,)),
    Planted(NanSwallowed, (WILD,)),
    Planted(InfSaturates, (WILD,)),
    Planted(BarrierMissing, (Y, GRADIENTS, ALONE)),
    Planted(SplitWhereRowsAreFew, (ALONE,)),
    Planted(OrderByAlignment, (LAYOUT, ALONE)),
    Planted(OrderByThreads, ("threads do not matter",)),
    Planted(Atomics, ("runs repeat",)),
    Planted(RstdOfTheFirstRow, (GRADIENTS,)),
    Planted(RstdInHalf, (GRADIENTS,)),
    Planted(ProjectionMissing, (GRADIENTS,)),
    Planted(ProjectionOverPadding, (GRADIENTS,)),
    Planted(RowLost, (GRADIENTS,)),
    Planted(RowTwice, (GRADIENTS,)),
    Planted(RowsSummedInHalf, (GRADIENTS,)),
    Planted(DweightUnwrittenWithoutRows, (GRADIENTS,)),
    Planted(DsumIgnored, (ADD,)),
    Planted(DsumTwice, (ADD,)),
    Planted(SumNotRounded, (ADD,)),
]


class Source(NamedTuple):
    """A defect in csrc: patches, and the properties of which each must fail."""

    name: str
    patches: tuple[Patch, ...]
    caught_by: tuple[str, ...]


CPU = "rmsnorm_cpu.cpp"
CPU_SOURCE = [
    Source(
        "a tail's padding is not cleared",
        (Patch(CPU, "std::memset(static_cast<void*>(pad), 0, kLanes * sizeof(T));", ""),),
        (Y, ALONE),
    ),
    Source(
        "eps outside the root",
        (
            Patch(
                CPU,
                "std::sqrt(mean + static_cast<double>(static_cast<C>(eps)))",
                "(std::sqrt(mean) + static_cast<double>(static_cast<C>(eps)))",
            ),
        ),
        (Y, GRADIENTS),
    ),
    Source(
        "row offsets wrap at 2^15",
        (Patch(CPU, "return row * rows.stride[0];", "return row * rows.stride[0] % 32768;"),),
        (Y, GRADIENTS),
    ),
    Source(
        "one long sum in each lane",
        (Patch(CPU, "kLanes = 64, kDepth = 8,", "kLanes = 64, kDepth = 4096,"),),
        (Y,),
    ),
    Source(
        "the last row adds nothing to dweight",
        (Patch(CPU, "sum[k] += dy * normed;", "if (first + r + 1 < p.rows) sum[k] += dy * normed;"),),
        (GRADIENTS,),
    ),
    Source(
        "y is written in whole vectors",  # into the band around it: run without one, it would damage the heap
        (
            Patch(
                CPU,
                "if (out == pad) std::memcpy(static_cast<void*>(y + i), pad, (hidden - i) * sizeof(T));",
                "if (out == pad) std::memcpy(static_cast<void*>(y + i), pad, kLanes * sizeof(T));",
            ),
        ),
        (GUARDS,),
    ),
    Source(
        "dsum is added to a group's first row alone",
        (Patch(CPU, "if (d) dh +=", "if (d && r == 0) dh +="),),
        (ADD,),
    ),
]
# Needs a card and nvcc. A patch may not make the card fault: the tests that follow would lose their context.
ROWS, FORWARD, GRAD = "rows.cuh", "rmsnorm.cu", "rmsnorm_grad.cu"
CUDA_SOURCE = [
    Source(
        "a tail is dropped",
        (Patch(ROWS, "count = (hidden + V - 1) / V;", "count = hidden / V;"),),
        (Y, GRADIENTS),
    ),
    Source(
        "row offsets wrap at 2^15",
        (Patch(ROWS, "if (dims == 1) return row * stride[0];", "if (dims == 1) return row * stride[0] % 32768;"),),
        (Y, GRADIENTS),
    ),
    Source(
        "half an element's shift is lost",
        (
            Patch(
                ROWS,
                "before * static_cast<int>(sizeof(T)));\n  }",
                "before * static_cast<int>(sizeof(T)) / 4 * 4);\n  }",
            ),
        ),
        (Y, GRADIENTS),
    ),
    Source(
        "eps outside the root",
        (
            Patch(
                FORWARD,
                "kExact ? __frsqrt_rn(mean + a.eps) : rsqrtf(mean + a.eps)",
                "1.0f / (sqrtf(mean) + a.eps)",
            ),
        ),
        (Y,),
    ),
    Source(
        "the mean counts a tail's padding",
        (
            Patch(
                FORWARD,
                "sum * (1.0f / static_cast<float>(a.hidden))",
                "sum * (1.0f / static_cast<float>(place.count * V))",
            ),
        ),
        (Y,),
    ),
    Source(
        "nobody waits for the other warps' sums",
        (
            Patch(
                ROWS,
                "__syncthreads();\n      sum = sum_slots<kExact>(own[0], own[1], g.lanes / 32);",
                "sum = sum_slots<kExact>(own[0], own[1], g.lanes / 32);",
            ),
        ),
        (Y,),
    ),
    Source(
        "the last row adds nothing to dweight",
        (
            Patch(
                GRAD,
                "if (live(row)) dw[k][i]",
                "if (row + 1 < a.rows) dw[k][i]",
            ),
        ),
        (GRADIENTS,),
    ),
    Source(
        "what earlier kernels left in shared memory is added to dweight",
        (Patch(GRAD, "if (live(row)) dw[k][i]", "dw[k][i]"),),
        ("runs repeat",),
    ),
    Source(
        "a block's part of dweight is lost",
        (Patch(GRAD, "row = threadIdx.y; row < count;", "row = threadIdx.y; row + 1 < count;"),),
        (GRADIENTS,),
    ),
    Source(
        "bf16 is truncated",
        (
            Patch(
                ROWS,
                "__nv_bfloat162 rounded = __float22bfloat162_rn(two);",
                "__nv_bfloat162 rounded(__float2bfloat16_rz(two.x), __float2bfloat16_rz(two.y));",
            ),
        ),
        ("half is rounded",),
    ),
    Source(
        "dsum is ignored",
        (Patch(GRAD, "unpack(pack_of(2), h);", "unpack(zeros<T>(), h);"),),
        (ADD,),
    ),
    Source(
        "an output's end is written in whole chunks",
        (
            Patch(
                ROWS,
                "store16(high - low == V, to + c * V, p);",
                "store16(high > low, to + c * V, p);",
            ),
        ),
        (GUARDS,),
    ),
    Source(
        "rstd of another row",
        (
            Patch(
                FORWARD,
                "place.first == 0) static_cast<float*>(a.rstd)[row]",
                "row == 0) static_cast<float*>(a.rstd)[row]",
            ),
        ),
        (GRADIENTS,),
    ),
]
