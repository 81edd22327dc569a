"""RMSNorm, alone and with the sum before it, forward and backward: every backend over dtype, hidden size and rows.

Work of one call: forward reads x and writes y (2 tensors); backward, dx and dw together, reads x and dy and writes dx
(3 tensors). With the sum, forward reads x and residual and writes y and their sum (4); backward reads dy, the sum and
the sum's gradient from elsewhere, and writes dx, which is the residual's too (4). The weight and dw are counted too.
The backends of one setting are measured in turn, block by block, and each is judged against torch's own. Large inputs
are as in ANCHORS, 0.5 GiB and 2 GiB at `datacenter`; of 2 GiB eager, which takes six times as much, is left out.
`call` is the host's time for one call, with so little to do that a device is always done before the next.
"""

import pytest
import torch

from tinylm import ops
from tinylm.bench import cells
from tinylm.bench.proof import Case, against
from tinylm.model import DTYPES

IMPLS = list(ops.OPS["rmsnorm"])
FUSED = [impl for impl in IMPLS if impl != "eager"]
DIRECTIONS = ["forward", "backward"]
MIB = 1 << 20
EPSILON = 1e-5

COMMON = [256, 384, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
COMMON_FP32 = [256, 1024, 4096, 8192, 16384, 32768, 65536]
OF_EIGHT = [1000, 3072, 5120, 11008, 14336]  # multiples of 8
ODD = [1001, 4095, 50257]

# A call takes the host some 5 us, and the wait for the device at the end of a sample 10 us: 0.4% of that of so many.
CALLS = 500
# Of a reference in fp64 at a time: of all at once, autograd would keep several times a GPU's memory.
REFERENCE_ELEMENTS = 1 << 24


def grid(mib, hidden, dtype, impl=IMPLS):
    """Inputs of `mib` MiB for each hidden size."""
    rows = lambda cell: max(1, mib * MIB // (cell["hidden"] * DTYPES[cell["dtype"]].itemsize))  # noqa: E731
    return {"direction": DIRECTIONS, "dtype": dtype, "hidden": hidden, "rows": rows, "impl": impl}


def few_rows(dtype):
    """As in decode: a row per sequence."""
    return {"direction": ["forward"], "dtype": dtype, "hidden": [4096], "rows": [1, 16, 128], "impl": IMPLS}


def adding(cells):
    return {"op": ["add_rmsnorm"]} | cells


def call(dtype):
    """A device has less to do than the host, however fast that calls."""
    return {"phase": ["call"], "dtype": dtype, "hidden": [256], "rows": [1], "impl": IMPLS}


# A compiled backward takes a C++ compiler 10 s on a small machine, so `quick` compiles at two sizes only.
QUICK = [impl for impl in IMPLS if impl != "compile"]


@cells(
    choices={"impl": IMPLS, "dtype": DTYPES, "direction": DIRECTIONS},
    seconds={"cuda": 0.5, "cpu": 0.3},
    quick=[
        grid(2, [256, 1024, 4096, 16384, 65536], ["fp32", "fp16"], QUICK),
        grid(2, [1024, 4096], ["fp32", "fp16"]),
        few_rows(["fp32", "fp16"]),
    ],
    laptop=[grid(64, [1024, 4096, 16384], ["fp16", "fp32", "bf16"]), few_rows(["bf16"])],
    datacenter=[
        grid(512, COMMON, ["bf16"]),
        grid(512, COMMON_FP32, ["fp32"]),
        grid(512, [*OF_EIGHT, *ODD], ["bf16"], FUSED),
        grid(2048, COMMON, ["bf16"], FUSED),
        grid(2048, COMMON_FP32, ["fp32"], FUSED),
    ],
)
def test_rmsnorm(measure, device, direction, dtype, hidden, rows, impl):
    run(measure, device, "rmsnorm", direction, dtype, hidden, rows)


@cells(
    choices={"op": ["add_rmsnorm"], "impl": IMPLS, "dtype": DTYPES, "direction": DIRECTIONS},
    seconds={"cuda": 0.6, "cpu": 0.3},
    quick=[adding(grid(2, [4096], ["fp32"], QUICK))],
    laptop=[adding(grid(64, [4096], ["fp16", "bf16"])), adding(few_rows(["bf16"]))],
    datacenter=[adding(grid(512, [1024, 4096, 8192], ["bf16", "fp32"]))],
)
def test_add_rmsnorm(measure, device, op, direction, dtype, hidden, rows, impl):
    run(measure, device, op, direction, dtype, hidden, rows)


@cells(
    choices={"phase": ["call"], "impl": IMPLS, "dtype": DTYPES},
    seconds={"cuda": 0.5, "cpu": 0.5},
    quick=[call(["fp32"])],
    laptop=[call(["bf16"])],
)
def test_call(measure, device, phase, dtype, hidden, rows, impl):
    kind = DTYPES[dtype]

    def build(backend):
        rmsnorm = backend_of("rmsnorm", backend, device, kind)

        def inputs():
            return randn(device, kind, rows, hidden), randn(device, kind, hidden)

        def calls(x, weight):
            with torch.inference_mode():
                for _ in range(CALLS):
                    y = rmsnorm(x, weight, EPSILON)
            return y

        def reference(x, weight):
            return ops.REFERENCES["rmsnorm"](x, weight, EPSILON)

        return Case(calls, inputs, against(reference, tolerance(kind)))

    measure.interleaved("impl", build, base="torch", timing="host", units=CALLS)


def run(measure, device, op, direction, dtype, hidden, rows):
    """A cell of either op. add_rmsnorm has two of everything: x and residual, y and the sum, their gradients."""
    kind, backward = DTYPES[dtype], direction == "backward"
    count = 2 if op == "add_rmsnorm" else 1

    def build(backend):
        norm = backend_of(op, backend, device, kind)

        def inputs():
            given = [*rows_of(count), randn(device, kind, hidden)]
            if not backward:
                return tuple(given)
            results = norm(*(t.requires_grad_() for t in given), EPSILON)
            return *given, *(results if count > 1 else [results]), *rows_of(count)

        def forward(*args):
            with torch.inference_mode():
                return norm(*args, EPSILON)

        def gradients(*args):
            results, given = args[count + 1 : -count], args[-count:]
            return torch.autograd.grad(results, (args[0], args[count]), given, retain_graph=True)

        return Case(gradients if backward else forward, inputs, against(reference, tolerance(kind)))

    def rows_of(count):
        return [randn(device, kind, rows, hidden) for _ in range(count)]

    def reference(*args):
        x = args[0].detach()
        if count > 1:
            x = x + args[1].detach()
        weight = args[count].detach().double().requires_grad_()
        expected = torch.empty(rows, hidden, device=device, dtype=torch.float64)
        dweight = torch.zeros_like(weight)
        step = max(1, REFERENCE_ELEMENTS // hidden)
        for part in (slice(start, start + step) for start in range(0, rows, step)):
            wide = x[part].double().requires_grad_()
            y = ops.REFERENCES["rmsnorm"](wide, weight, EPSILON)
            if backward:
                dy, *elsewhere = args[-count:]
                expected[part], dw = torch.autograd.grad(y, (wide, weight), dy[part].double())
                dweight += dw
                for gradient in elsewhere:
                    expected[part] += gradient[part]
            else:
                expected[part] = y.detach()
        if backward:
            return expected, dweight
        return (expected, x) if count > 1 else expected

    tensors = 4 if count > 1 else 3 if backward else 2
    measure.interleaved(
        "impl",
        build,
        base="torch",
        # A few rows are a matter of launches, and are to be compared as decoding runs them.
        timing="graph" if device == "cuda" and not backward and rows <= 128 else None,
        bytes=(tensors * rows + (2 if backward else 1)) * hidden * kind.itemsize,
    )


def backend_of(op, backend, device, kind):
    """The callable; skips where it cannot run."""
    if reason := ops.probe(op, backend, device, kind):
        pytest.skip(f"{op}/{backend}: {reason}")
    return ops.get(op, backend)


def randn(device, kind, *shape):
    return torch.randn(*shape, device=device, dtype=kind)


def tolerance(kind):
    """Of the norm of the error over that of the result.

    One rounding to the dtype puts an error of at most eps/2 on each element; eager and compiled composes round once or
    twice in between (x to fp32 is exact, the product with the weight, the sum of gradients and the result are not), so
    2 eps is never passed by a right result. fp32 sums of `hidden` or `rows` terms add eps * sqrt(terms), the walk of
    the rounding errors of a sum in any order; a million rows make that 1,024.
    """
    return 2 * torch.finfo(kind).eps if kind.itemsize == 2 else 1024 * torch.finfo(kind).eps
