"""RMSNorm's properties, held by every backend of `rmsnorm` and `add_rmsnorm`, on the CPU and on a GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from raw_kernels import PATTERN, Compiled, compiler, guards_stay, norms_of
from rmsnorm_properties import (
    GUARDED,
    KINDS,
    MANY,
    PROPERTIES,
    SIZES,
    WILD_ROWS,
    Interval,
    Norms,
    Property,
    assert_same,
    assert_y,
    call,
    call_add,
    dweight_roundings,
    gradient_bounds,
    leaf,
    rounded,
    specification,
    ulps_apart,
    unit,
    wild,
    y_ulps,
)
from strategies import HALF, Inputs, NormCase, Placed
from torch import Tensor

from tinylm import ops
from tinylm.ops.rmsnorm import compiled_rmsnorm, rmsnorm_eager, rmsnorm_reference

# torch.compile imports parts of torch that warn of their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

DEVICES = ("cpu", "cuda")


class Fault(NamedTuple):
    """Why a library's backend does not have a property, and which calls have it all the same."""

    reason: str
    spares: Callable[[NormCase], bool]
    drawn: bool = True  # whether any of the cases that are drawn is spared


UNDERFLOW = Fault(
    "the gradient has rstd^3, which fp32 cannot hold where x is 1e16, nor fp64 where it is 1e119",
    lambda case: case.magnitude not in ("large", "mixed") or case.dtype == torch.float16,
)
ORDER = Fault("a row's sum is split among threads where there are few rows", lambda case: case.hidden < 16_384)
OF_GRADIENTS = dict.fromkeys(("gradients are near", "wild rows are as in fp32", "a sum has a gradient"), UNDERFLOW)
TWICE = Fault(
    "autograd rounds the gradient of y before it adds the one of new_residual",
    lambda case: case.dtype not in HALF,
)
STRIDED = Fault("outputs have strides like those of x", lambda case: case.x.layout == "contiguous")
BOTH = Fault(
    "both of these, and the rows drawn are of mixed magnitudes",
    lambda case: TWICE.spares(case) and UNDERFLOW.spares(case),
    drawn=False,
)
LIBRARY = OF_GRADIENTS | {"rows are alone": ORDER, "layout does not matter": ORDER, "add is its composition": TWICE}
LIBRARY["add near wild rows"] = BOTH


def nothing(case: NormCase) -> bool:
    return False


ROWS = Fault("the order of a row's sum depends on how many rows there are, and where they lie", nothing, drawn=False)
GPU = LIBRARY | {"rows are alone": ROWS, "layout does not matter": ROWS}
TWO_KERNELS = Fault("the sum's kernel has other roundings than the norm's", nothing, drawn=False)


def short(case: NormCase) -> bool:
    return case.dtype in HALF or case.hidden < 16_384


def ordinary(case: NormCase) -> bool:
    return short(case) and UNDERFLOW.spares(case) and case.magnitude != "denormal"


LONG = Fault("sums of tens of thousands of numbers are off by more than their terms", short)
ORDINARY = Fault("that, underflow, and squares of denormals", ordinary)
INFINITE = Fault(
    "y is NaN in all of a row that has an inf", lambda case: case.magnitude == "overflow" and UNDERFLOW.spares(case)
)
ORDINARY_TWICE = Fault("all these", lambda case: TWICE.spares(case) and ordinary(case))
# What is not here is held without exception; `cuda`, our own, is not here.
FAULTS: dict[tuple[str, str], dict[str, Fault]] = {
    ("eager", "cpu"): LIBRARY | {"outputs are contiguous": STRIDED},
    ("eager", "cuda"): GPU | {"outputs are contiguous": STRIDED},
    ("torch", "cpu"): LIBRARY,
    ("torch", "cuda"): GPU
    | {
        "y is near": LONG,
        "gradients are near": ORDINARY,
        "a sum has a gradient": ORDINARY,
        "wild rows are as in fp32": INFINITE,
        "add is its composition": ORDINARY_TWICE,
    },
    ("liger", "cuda"): {"add is its composition": TWO_KERNELS},
}
# compile takes seconds a shape, and is held to what stands here.
COMPILED = {name: [NormCase((4,), 64, torch.bfloat16)] for name in ("y is near", "gradients are near")}


def needs(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


def backend_on(device: str, op: str, backend: str) -> Norms:
    """The backend's callables, or a skip that says why there are none here."""
    needs(device)
    for name in {"rmsnorm", op}:
        if backend not in ops.OPS.get(name, {}):
            pytest.skip(f"{name} has no backend {backend}")
        reason = ops.probe(name, backend, device, torch.float32)
        if reason is not None:
            pytest.skip(reason)
    return Norms(ops.get("rmsnorm", backend), ops.OPS.get("add_rmsnorm", {}).get(backend))


def hold(which: Property, norms: Norms, device: str, **how: Any) -> None:
    """The property's fixed cases, then drawn ones; `how` are Hypothesis's settings."""
    for case in [*which.always, *(which.on_gpu if device == "cuda" else [])]:
        try:
            which.check(norms, case, device)
        except Exception as error:
            error.add_note(str(case))
            raise
    if which.cases is not None and which.examples:

        @settings(max_examples=which.examples, **how)
        @given(which.cases(device))
        def drawn(case: NormCase) -> None:
            which.check(norms, case, device)

        drawn()


def held_to(which: Property, name: str, backend: str, device: str) -> Property:
    """The property as far as a backend is held to it."""
    if backend == "cuda":
        return which
    if backend == "compile":
        return which._replace(cases=None, always=COMPILED[name], on_gpu=())
    fault, cases = FAULTS.get((backend, device), {}).get(name), which.cases
    always = [case for case in which.always if fault is None or fault.spares(case)]
    on_gpu = [case for case in which.on_gpu if fault is None or fault.spares(case)]
    if fault is not None and cases is not None:
        spares = fault.spares
        which = which._replace(cases=lambda on: cases(on).filter(spares))
    # A library has tests of its own.
    examples = which.examples // 4 if fault is None or fault.drawn else 0
    return which._replace(examples=examples, always=always[::4], on_gpu=on_gpu[::4])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("backend", ops.OPS["rmsnorm"])
def test_property(backend: str, name: str, device: str) -> None:
    if backend == "compile" and name not in COMPILED:
        pytest.skip("compile takes seconds a shape")
    norms = backend_on(device, PROPERTIES[name].op, backend)
    which = held_to(PROPERTIES[name], name, backend, device)
    if not (which.always or which.on_gpu or which.examples):
        pytest.skip(FAULTS[backend, device][name].reason)
    hold(which, norms, device)


def test_the_specification_is_the_formula_in_fp32_where_squares_overflow() -> None:
    for case in WILD_ROWS:
        given = case.inputs("cpu")
        weight = given.weight.float()
        x = given.x.float().requires_grad_()
        y = rmsnorm_eager(x, weight, case.eps)
        (dx,) = torch.autograd.grad(y, x, given.dy.float())
        rows = wild(given.x).squeeze(-1)
        assert torch.equal(y[rows].nan_to_num(7), specification(given.x, weight, case.eps)[rows].float().nan_to_num(7))
        expected, _ = gradient_bounds(given.x, given.weight, given.dy, case.eps)
        Interval(expected.low[rows], expected.high[rows]).holds("dx", dx[rows].to(given.x.dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_once_is_right_where_twice_is_not(dtype: torch.dtype) -> None:
    # Just above the middle of two numbers: fp32 makes it the middle, and that goes to the even one, down.
    middle = 1 + torch.finfo(dtype).eps / 2
    value = torch.tensor([middle + 2.0**-40, -1e-30, 1e30, math.inf, math.nan], dtype=torch.float64)
    once = rounded(value, dtype)
    assert once[0] == 1 + torch.finfo(dtype).eps and value.to(dtype)[0] == 1
    assert torch.equal(once[1:].nan_to_num(7), value[1:].to(dtype).nan_to_num(7))


@pytest.mark.parametrize("dtype", HALF)
def test_ulps_are_counted_through_zero_and_to_inf(dtype: torch.dtype) -> None:
    kind = torch.finfo(dtype)
    least = kind.tiny * kind.eps
    a = torch.tensor([least, 0.0, 1.0, kind.max, math.nan, math.nan], dtype=dtype)
    b = torch.tensor([-least, -0.0, 1 + 3 * kind.eps, math.inf, math.nan, 1.0], dtype=dtype)
    assert ulps_apart(a, b).tolist() == [2, 0, 3, 1, 0, math.inf]


def test_fp32_bounds_are_single_digits() -> None:
    assert y_ulps(70_000) < 9


def test_compile_compiles_every_shape_however_many() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    rmsnorm = compiled_rmsnorm(count)
    assert not graphs, "nothing is compiled before the first call"
    shapes = [(rows, hidden) for rows in (1, 2, 3, 4, 5) for hidden in (8, 16, 24, 32)]
    for _ in range(2):
        for shape in shapes:
            x, weight = torch.randn(shape), torch.randn(shape[-1])
            torch.testing.assert_close(rmsnorm(x, weight, 1e-5), rmsnorm_reference(x, weight, 1e-5).float())
    # Dynamo's own limit is 8 per function.
    assert len(graphs) == len(shapes)


def test_compile_inside_a_compiled_function_is_one_graph() -> None:
    outer = torch.compile(lambda x, w: compiled_rmsnorm()(x * 2, w, 1e-5), fullgraph=True, backend="eager")
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(outer(x, weight), rmsnorm_reference(x * 2, weight, 1e-5).float())


@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_gradcheck(backend: str, lead: tuple[int, ...], wide_weight: bool) -> None:
    norms = Norms(rmsnorm_reference) if backend == "reference" else backend_on("cpu", "add_rmsnorm", backend)
    given = NormCase(lead, 5, torch.float64).inputs("cpu")
    x, residual, weight = leaf(given.x), leaf(given.residual), leaf(given.weight)
    # Differences in fp64 cannot be taken of an fp32 weight: it stays as it is.
    fixed = given.weight.float() if wide_weight else weight
    assert torch.autograd.gradcheck(lambda x, w: norms.norm(x, w, 1e-3), (x, fixed))
    if (add := norms.add) is not None:
        assert torch.autograd.gradcheck(lambda x, r, w: add(x, r, w, 1e-3), (x, residual, fixed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case",
    [
        NormCase((3,), 5),
        NormCase((0,), 8, torch.float16),
        NormCase((), 33, torch.bfloat16, wide_weight=True),
        NormCase((2, 3), 16, torch.float16, wide_weight=True, x=Placed("transposed", 3), dy=Placed("sliced", 1)),
        NormCase((2, 3), 16, torch.bfloat16, x=Placed("gapped"), dy=Placed("expanded"), residual=Placed("sliced")),
    ],
    ids=lambda case: f"{case.lead}-{case.x.layout}-{str(case.dtype)[6:]}",
)
def test_opcheck(case: NormCase, device: str) -> None:
    backend_on(device, "add_rmsnorm", "cuda")
    given, eps = case.inputs(device), case.eps
    library = torch.ops.tinylm
    x, residual, weight = leaf(given.x), leaf(given.residual), leaf(given.weight)
    _, rstd = library.rmsnorm(given.x, given.weight, eps)
    _, total, rstd_of_sum = library.add_rmsnorm(given.x, given.residual, given.weight, eps)
    for op, arguments in (
        (library.rmsnorm, (x, weight, eps)),
        (library.rmsnorm_inference, (given.x, given.weight, eps)),
        (library.rmsnorm_backward, (given.dy, given.x, given.weight, rstd)),
        (library.add_rmsnorm, (x, residual, weight, eps)),
        (library.add_rmsnorm_inference, (given.x, given.residual, given.weight, eps)),
        (library.add_rmsnorm_backward, (given.dy, given.dsum, total, given.weight, rstd_of_sum)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    """csrc's kernels, compiled once a device; a skip where they cannot be."""

    @functools.cache
    def compiled(device: str) -> Compiled:
        reason = compiler(device)
        if reason is not None:
            pytest.skip(reason)
        return Compiled(tmp_path_factory.mktemp("kernels"), device, quick=False)

    return compiled


@pytest.mark.parametrize("device", DEVICES)
def test_guard_bands_stay(kernels: Callable[[str], Compiled], device: str) -> None:
    raw = kernels(device)
    hold(GUARDED._replace(check=lambda _, case, on: guards_stay(raw, case, on)), norms_of(raw), device)


def test_the_width_of_vectors_does_not_matter(tmp_path: Path) -> None:
    """The CPU kernel has several; the one of 16 bytes computes the bits of the one that this machine takes."""
    shipped = backend_on("cpu", "add_rmsnorm", "cuda")
    if (reason := compiler("cpu")) is not None:
        pytest.skip(reason)
    narrow = norms_of(Compiled(tmp_path, "cpu"))
    assert shipped.add is not None and narrow.add is not None
    for case in [*SIZES[1::4], *MANY, *KINDS[::2]]:
        given = case.inputs("cpu")
        ours, theirs = call_add(shipped.add, given, case.eps), call_add(narrow.add, given, case.eps)
        for name, a, b in zip(("y", "sum", "dx", "dresidual", "dweight"), ours, theirs, strict=True):
            assert_same(f"{name} of {case}", a, b)


def test_what_lies_around_outputs_in_the_allocators_pool_stays() -> None:
    """The op's own allocations: sizes that leave room to the allocator's next multiple of 512 bytes."""
    backend_on("cuda", "add_rmsnorm", "cuda")
    library, size = torch.ops.tinylm, 1 << 20
    given = NormCase((7,), 1001, torch.float16).inputs("cuda")
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        blocks = [torch.full((size,), PATTERN, dtype=torch.uint8, device="cuda") for _ in range(8)]
        begins = [block.data_ptr() for block in blocks]
        del blocks
        # The ops themselves: autograd's thread allocates elsewhere.
        y, total, rstd = library.add_rmsnorm(given.x, given.residual, given.weight, 1e-6)
        outputs = y, total, *library.add_rmsnorm_backward(given.dy, given.dsum, total, given.weight, rstd)
        ends = [output.data_ptr() + output.numel() * output.element_size() for output in outputs]
        del y, total, rstd
        del outputs  # all of it, and the blocks below lie where the ones above did
        blocks = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(8)]
        found = 0
        for block in blocks:
            for end in ends:
                at = end - block.data_ptr()
                if block.data_ptr() in begins and 0 < at < size:
                    room = -end % 512
                    assert (block[at : at + room] == PATTERN).all(), f"written within {room} bytes after an output"
                    found += room > 0
        assert found == len(ends), "the outputs were not in the memory that was prepared"


@pytest.mark.parametrize("hidden", [64, 4096])
@pytest.mark.parametrize(("backend", "gibibytes"), [("torch", 110), ("cuda", 32)])
def test_more_than_two_to_the_31_elements(backend: str, gibibytes: int, hidden: int) -> None:
    norms = backend_on("cuda", "rmsnorm", backend)
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of the device's memory, {free} are free")
    rows, eps = (1 << 31) // hidden + 100, 1e-6
    torch.manual_seed(0)
    x, dy = (torch.empty(rows, hidden, dtype=torch.float16, device="cuda").normal_() for _ in range(2))
    weight = torch.randn(hidden, device="cuda")
    y, dx, dweight = call(norms.norm, Inputs(x, x, weight, dy, dy), eps)
    exact, sizes = torch.zeros(2, hidden, dtype=torch.float64, device="cuda")
    step = (1 << 24) // hidden
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        assert_y(y[part], x[part], weight, eps)
        gradient_bounds(x[part], weight, dy[part], eps)[0].holds(f"dx from row {begin}", dx[part])
        x64 = x[part].double()
        terms = dy[part].double() * x64 * (x64.square().mean(-1, keepdim=True) + eps).rsqrt()
        exact, sizes = exact + terms.sum(0), sizes + terms.abs().sum(0)
    slack = dweight_roundings(rows, hidden) * unit(torch.float32) * sizes
    Interval.around(exact, slack, torch.float32).holds("dweight", dweight)
