"""RMSNorm forward and backward: every backend over dtype, hidden size and rows.

Work of one call: forward reads x and writes y (2 tensors); backward, dx and dw together, reads x and dy and writes dx
(3 tensors). The weight and dw are counted too. The backends of one setting are measured in turn, block by block, and
each is judged against torch's own. Large inputs are as in ANCHORS: 0.5 GiB at `datacenter`.
"""

import pytest
import torch

from benchmarks.inputs import DTYPES
from tinylm import ops
from tinylm.bench import cells
from tinylm.bench.proof import Case, against

IMPLS = list(ops.OPS["rmsnorm"])
DIRECTIONS = ["forward", "backward"]
MIB = 1 << 20
EPSILON = 1e-5


def grid(mib, hidden, dtype, impl=IMPLS):
    """Inputs of `mib` MiB for each hidden size."""
    rows = lambda cell: max(1, mib * MIB // (cell["hidden"] * DTYPES[cell["dtype"]].itemsize))  # noqa: E731
    return {"direction": DIRECTIONS, "dtype": dtype, "hidden": hidden, "rows": rows, "impl": impl}


def few_rows(dtype):
    """As in decode: a row per sequence."""
    return {"direction": ["forward"], "dtype": dtype, "hidden": [4096], "rows": [1, 16, 128], "impl": IMPLS}


@cells(
    choices={"impl": IMPLS, "dtype": DTYPES, "direction": DIRECTIONS},
    seconds={"cuda": 0.6, "cpu": 0.3},
    # A compiled backward takes a C++ compiler 10 s on a small machine, so `quick` compiles at two sizes only.
    quick=[
        grid(2, [256, 1024, 4096, 16384, 65536], ["fp32", "fp16"], [i for i in IMPLS if i != "compile"]),
        grid(2, [1024, 4096], ["fp32", "fp16"]),
        few_rows(["fp32", "fp16"]),
    ],
    laptop=[grid(64, [1024, 4096, 16384], ["fp16", "fp32", "bf16"]), few_rows(["bf16"])],
    datacenter=[
        grid(512, [256, 384, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536], ["bf16"]),
        grid(512, [256, 1024, 4096, 8192, 16384, 32768, 65536], ["fp32"]),
    ],
)
def test_rmsnorm(measure, device, direction, dtype, hidden, rows, impl):
    kind = DTYPES[dtype]
    backward = direction == "backward"
    tensor = rows * hidden * kind.itemsize

    def build(backend):
        if reason := ops.probe("rmsnorm", backend, device, kind):
            pytest.skip(f"rmsnorm/{backend}: {reason}")
        rmsnorm = ops.get("rmsnorm", backend)

        def inputs():
            x, dy = (torch.randn(rows, hidden, device=device, dtype=kind) for _ in range(2))
            weight = torch.randn(hidden, device=device, dtype=kind)
            if not backward:
                return x, weight
            x, weight = x.requires_grad_(), weight.requires_grad_()
            return x, weight, rmsnorm(x, weight, EPSILON), dy

        def forward(x, weight):
            with torch.inference_mode():
                return rmsnorm(x, weight, EPSILON)

        def gradients(x, weight, y, dy):
            return torch.autograd.grad(y, (x, weight), dy, retain_graph=True)

        return Case(gradients if backward else forward, inputs, against(reference, tolerance(kind)))

    def reference(x, weight, *gradient):
        x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
        y = ops.REFERENCES["rmsnorm"](x, weight, EPSILON)
        return torch.autograd.grad(y, (x, weight), gradient[1].double()) if gradient else y.detach()

    measure.interleaved(
        "impl",
        build,
        base="torch",
        bytes=(3 if backward else 2) * tensor + (2 if backward else 1) * hidden * kind.itemsize,
    )


def tolerance(kind):
    """Of the norm of the error over that of the result.

    One rounding to the dtype puts an error of at most eps/2 on each element; eager and compiled composes round once
    or twice in between (x to fp32 is exact, the product with the weight and the result are not), so 2 eps is never
    passed by a right result. fp32 sums of `hidden` or `rows` terms add eps * sqrt(terms), the walk of the rounding
    errors of a sum in any order; 65,536 columns, or a million rows, make that 1,024.
    """
    return 2 * torch.finfo(kind).eps if kind.itemsize == 2 else 1024 * torch.finfo(kind).eps
