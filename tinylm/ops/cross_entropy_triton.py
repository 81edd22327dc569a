"""The pass of chunked linear cross-entropy over its logits, in Triton: loss and gradient, in place.

A program has a row, whose gradient it writes over the logits. A short row stays in registers in between (10,000 bf16
logits on an H200: .92 of copy, .65 if it is read twice). A longer one is read once for log(sum(exp)), with a running
maximum, and once more for the gradient: 50,304 bf16 logits .61. No faster: 16 or 32 warps, which leave more of the L2
cache to a row; as few programs as fit it, each of which takes row after row; a running sum in each lane.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HELD = 16_384  # columns of a row in registers, at most: 64 of them in a thread
BLOCK = 4096  # else columns at a time, in 8 warps: 16 of them in a thread, two loads of 16 bytes
IGNORED = tl.constexpr(-100)


def to_gradient(logits: Tensor, targets: Tensor, losses: Tensor, gradient: bool) -> None:
    """losses (rows,) fp32 of logits (rows, V) contiguous and targets (rows,) int64; logits become softmax - onehot.

    A row whose target is -100 gets 0 in both; one whose target is outside 0..V-1, a NaN loss.
    """
    rows, vocab_size = logits.shape
    if rows == 0:
        return
    if vocab_size <= HELD:
        block = triton.next_power_of_2(vocab_size)
        _held[(rows,)](logits, targets, losses, vocab_size, block, gradient, num_warps=max(1, block // 2048))
    else:
        _twice[(rows,)](logits, targets, losses, vocab_size, BLOCK, gradient, num_warps=8)


@triton.jit
def _held(logits, targets, losses, V: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    column = tl.arange(0, BLOCK)
    counts = target != IGNORED
    inside = (target >= 0) & (target < V)
    value = tl.load(logits + column, mask=counts & (column < V), other=float("-inf")).to(tl.float32)
    chosen = tl.sum(tl.where(column == target, value, 0.0), 0)
    largest = tl.max(value, 0)
    part = tl.exp(value - largest)
    total = tl.sum(part, 0)
    loss = tl.where(inside, largest + tl.log(total) - chosen, float("nan"))
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        d = part / total - tl.where(column == target, 1.0, 0.0)
        d = tl.where(counts, d, 0.0)
        tl.store(logits + column, d.to(logits.dtype.element_ty), mask=column < V)


@triton.jit
def _twice(logits, targets, losses, V: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                column = start + columns
                tl.store(logits + column, tl.zeros([BLOCK], logits.dtype.element_ty), mask=column < V)
    else:
        inside = (target >= 0) & (target < V)
        # Loaded before the reductions, which are barriers: below, another warp may write over it.
        chosen = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
        largest = float("-inf")
        total = 0.0
        for start in range(0, V, BLOCK):
            column = start + columns
            value = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
            before = largest
            largest = tl.maximum(largest, tl.max(value, 0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(value - largest), 0)
        lse = largest + tl.log(total)
        tl.store(losses + row, lse - chosen)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                column = start + columns
                value = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
                d = tl.exp(value - lse) - tl.where(column == target, 1.0, 0.0)
                tl.store(logits + column, d.to(logits.dtype.element_ty), mask=column < V)
