"""Linear cross-entropy: the mean loss of logits x @ weight.T, which a memory-lean backend never holds all at once.

Shapes: N tokens, C hidden, V vocab_size. Every backend is a callable `(x (N, C), weight (V, C), targets (N,) int64)
-> ()`, in fp32 (fp64 for fp64 input): the mean over targets other than -100. As in F.cross_entropy it is NaN, with
gradients of 0, where every target is -100. Under autocast the product is one in autocast's dtype.

`chunked` makes some rows' logits at a time, and from them at once what these rows add to the gradients of x and
weight (as Liger Kernel does, arXiv:2410.10989), so its forward is the backward too: three products, as few as there
can be, since no logits are made again. The gradients are those of the sum, of logits in [-1, 1] whatever N: nothing
underflows in fp16, and weight's is summed in fp32. Backward multiplies them by what comes from above.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.ops.compiling import compiler

LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]

IGNORED = -100  # torch's own: ignore_index of F.cross_entropy
# Of one chunk's logits. On a GPU its products must fill the card, on a CPU the pass over it should stay in the caches.
CHUNK_BYTES = {"cuda": 2**29, "cpu": 2**25}
ALIGNED = 128  # rows: a tile of a matrix product


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The specification, in fp64 and returned in it, whatever the inputs' dtypes; differentiable."""
    return F.cross_entropy(x.double() @ weight.double().T, targets)


def linear_cross_entropy_eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`torch.nn.functional.cross_entropy` of all logits, widened to fp32."""
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def compiled_linear_cross_entropy(backend: str | Callable[..., object] = "inductor") -> LinearCrossEntropy:
    """The same through torch.compile, as `tinylm.ops.rmsnorm.compiled_rmsnorm`."""
    compile_for = compiler(backend)

    def linear_cross_entropy_compile(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return linear_cross_entropy_eager(x, weight, targets)
        key = x.shape, x.dtype, x.device, weight.shape, weight.dtype
        return compile_for(linear_cross_entropy_eager, *key)(x, weight, targets)

    return linear_cross_entropy_compile


def linear_cross_entropy_chunked(x: Tensor, weight: Tensor, targets: Tensor, *, rows: int | None = None) -> Tensor:
    """The loss without its logits: memory of one chunk of them, of x's gradient, and of weight's in fp32.

    rows: of a chunk; by default such that its logits take `CHUNK_BYTES`. Without gradients only the loss is made. A
    target outside 0..V-1 is an error on the CPU, and a NaN loss on a GPU, where to look would be to wait. Raises
    TypeError and ValueError for other inputs that do not fit, NotImplementedError for second derivatives.
    """
    _check(x, weight, targets)
    kind = x.device.type
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif dtype != weight.dtype:
        raise TypeError(f"linear_cross_entropy: x is {dtype} and weight {weight.dtype}: give one dtype, or autocast")
    if rows is None:
        rows = rows_of_a_chunk(x.shape[0], weight.shape[0], dtype.itemsize, CHUNK_BYTES.get(kind, CHUNK_BYTES["cpu"]))
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    total, _, _ = chunked_sum_op(x, weight, targets, rows, dtype, *wanted)
    count = (targets != IGNORED).sum()
    # NaN where nothing counts, but not by 0 / 0, whose gradient would be NaN too.
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def rows_of_a_chunk(rows: int, vocab_size: int, itemsize: int, limit: int) -> int:
    """Rows of equal chunks, whose logits take about `limit` bytes at most; multiples of 128 where that can be."""
    rows = max(rows, 1)
    least = -(-rows * vocab_size * itemsize // limit)
    for count in range(least, 2 * least):  # a few more chunks, if then none is ragged
        if rows % (count * ALIGNED) == 0:
            return rows // count
    return min(rows, ALIGNED * -(-rows // (least * ALIGNED)))


def _check(x: Any, weight: Any, targets: Any) -> None:
    op = "linear_cross_entropy"
    for name, tensor in (("x", x), ("weight", weight), ("targets", targets)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}: give a tensor")
        if tensor.device != x.device:
            raise ValueError(f"{op}: x is on {x.device} and {name} on {tensor.device}: move them to one device")
    if not x.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f"{op}: x is {x.dtype} and weight {weight.dtype}: give floating point")
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: targets are {targets.dtype}: give int64, such as targets.long()")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: x is {list(x.shape)} and weight {list(weight.shape)}: give (N, C) and (V, C)")
    if targets.shape != x.shape[:1]:
        raise ValueError(f"{op}: x is {list(x.shape)} and targets {list(targets.shape)}: give a target for each row")


def chunked_sum(
    x: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the losses, its gradients by x in `dtype` and by weight in fp32); a gradient not needed is empty."""
    if x.device.type == "cpu" and bool(((targets != IGNORED) & ((targets < 0) | (targets >= weight.shape[0]))).any()):
        raise ValueError(
            f"linear_cross_entropy: targets span {int(targets.min())}..{int(targets.max())}: "
            f"give {IGNORED} or 0..{weight.shape[0] - 1}, one of the {weight.shape[0]} rows of weight"
        )
    _, dx, dweight = _fake_sum(x, weight, targets, rows, dtype, need_x, need_weight)
    with torch.autocast(x.device.type, enabled=False):
        x, weight, targets = x.to(dtype), weight.to(dtype), targets.contiguous()
        losses = torch.empty(x.shape[0], dtype=_wide(dtype), device=x.device)
        buffer = torch.empty(min(rows, x.shape[0]), weight.shape[0], dtype=dtype, device=x.device)
        for first in range(0, x.shape[0], rows):
            chunk = slice(first, first + rows)
            logits = torch.mm(x[chunk], weight.T, out=buffer[: len(x[chunk])])
            _to_gradient(logits, targets[chunk], losses[chunk], need_x or need_weight)
            if need_x:
                torch.mm(logits, weight, out=dx[chunk])
            if need_weight:
                _add_product(dweight, logits.T, x[chunk], first > 0)
        return losses.sum(), dx, dweight


def _to_gradient(logits: Tensor, targets: Tensor, losses: Tensor, gradient: bool) -> None:
    """Writes losses (rows,) of logits (rows, V), and over the logits, if asked, their gradient, softmax - onehot."""
    if logits.is_cuda and logits.dtype != torch.float64 and _triton() is not None:
        _triton().to_gradient(logits, targets, losses, gradient)
        return
    ignored = targets == IGNORED
    inside = (targets >= 0) & (targets < logits.shape[1])
    chosen = torch.where(inside, targets, 0)[:, None]
    log_p = F.log_softmax(logits, -1, dtype=losses.dtype).gather(1, chosen)[:, 0]
    losses.copy_(torch.where(inside, -log_p, torch.nan).masked_fill_(ignored, 0))
    if gradient:
        p = F.softmax(logits, -1, dtype=losses.dtype)  # on a CPU six times as fast as the exp of what log_softmax gave
        p.scatter_add_(1, chosen, -inside[:, None].to(p.dtype))
        logits.copy_(p.masked_fill_(ignored[:, None], 0))


@functools.cache
def _triton() -> Any:
    try:
        from tinylm.ops import cross_entropy_triton
    except ImportError:
        return None
    return cross_entropy_triton


def _add_product(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """total (fp32) = a @ b, added to what is there if `add`; a and b may be narrower."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=int(add), out=total)
    elif a.is_cuda:  # summed in the product's own accumulator: no rounding to 16 bits, no pass of its own
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=int(add), out=total)
    elif add:
        total.add_(a @ b)
    else:
        total.copy_(a @ b)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fake_sum(
    x: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_x else (0,), dtype=dtype)
    return (
        x.new_empty((), dtype=_wide(dtype)),
        dx,
        weight.new_empty(weight.shape if need_weight else (0,), dtype=_wide(dtype)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, *_, need_x, need_weight = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype if need_x else None, weight.dtype if need_weight else None
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, dtotal: Tensor | None, *second: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(gradient is not None for gradient in second):
        raise NotImplementedError("linear_cross_entropy: chunked has no second derivatives: use backend eager")
    found = [
        None if dtype is None or dtotal is None else (gradient * dtotal).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return (*found, None, None, None, None, None)


# An op, so that it is opaque to torch.compile, which would be free to hold all chunks' logits at once.
chunked_sum_op = torch.library.custom_op("tinylm::linear_cross_entropy_sum", chunked_sum, mutates_args=())
chunked_sum_op.register_fake(_fake_sum)
chunked_sum_op.register_autograd(_backward, setup_context=_setup)
