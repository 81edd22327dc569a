"""What RMSNorm must be, as functions over any implementation of it: real backends and planted defects alike.

A property's check takes `Norms`, a `NormCase` and a device, and raises AssertionError. u is half the spacing of numbers
next to 1, the largest relative error of one rounding; bounds count roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from strategies import HALF, HIDDEN, LAYOUTS, TAME, Inputs, NormCase, Placed, norm_cases
from torch import Tensor

from tinylm.ops.rmsnorm import rmsnorm_reference

Norm = Callable[[Tensor, Tensor, float], Tensor]
AddNorm = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class Norms(NamedTuple):
    """A backend: differentiable callables; without `add` it has no fused op."""

    norm: Norm
    add: AddNorm | None = None


# --- numbers ---------------------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.promote_types(dtype, torch.float32)


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the dtype's numbers at an fp64 value: an ulp."""
    kind = torch.finfo(dtype)
    power = (value.contiguous().view(torch.int64) & 0x7FF << 52).view(torch.float64)  # the largest not above |value|
    return (power * kind.eps).clamp_(min=kind.tiny * kind.eps)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """An fp64 value in the dtype, rounded once: `.to` goes through fp32 to fp16 and bf16, and rounds twice."""
    if dtype not in HALF:
        return value.to(dtype)
    ulp = spacing(value, dtype)
    nearest = torch.where(value.isfinite(), torch.round(value / ulp) * ulp, value)  # to even; the quotient is exact
    return nearest.to(dtype)


def bits(value: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().contiguous().view(integers[value.element_size()])


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their dtype (fp16, bf16, fp32) lie between: inf follows the largest one, -0 is 0."""

    def place(value: Tensor) -> Tensor:
        at = bits(value).long()
        top = 1 << 8 * value.element_size() - 1
        return torch.where(at < 0, -(at + top), at)

    apart = (place(a) - place(b)).abs().double()
    return torch.where(a.isnan() | b.isnan(), torch.where(a.isnan() & b.isnan(), 0.0, math.inf), apart)


def additions(hidden: int) -> int:
    """On the longest way from a term to its row's sum: at most 16 one after another in a lane, then pairwise."""
    return min(hidden, 16) + math.ceil(math.log2(hidden))


def rstd_roundings(hidden: int) -> float:
    """In u. The square root halves what its argument is off by: a square's rounding, the sum's, a division (or a
    product with 1/hidden: two) and the sum with eps. Roundings have signs of their own, so a sum's grow like the root
    of their number (Higham and Mary, 2019, doi:10.1137/18M1226312, theorem 2.4); that is generous here, because terms
    do not share their way. Then root and division round, or rsqrtf, which is 1 ulp off."""
    return (1 + math.sqrt(additions(hidden)) + 2 + 1) / 2 + 2


def y_ulps(hidden: int) -> float:
    """How far y in fp32 may be off: rstd and two products. An ulp is at least one u of its number: 8.9 at 70,000."""
    return rstd_roundings(hidden) + 2


def dx_roundings(hidden: int) -> tuple[float, float]:
    """In u, for the two terms of dx = rstd g - rstd xhat mean(g xhat), where g = weight dy and xhat = x rstd.

    The first: g, the difference, rstd and the product with it. The second: xhat (once more than rstd); the mean, where
    each term has g's, xhat's and its own, and all go the whole way of a sum (terms of both signs cancel, so roundings
    count against the mean of sizes), then a division; the product of the two, the difference, rstd and its product."""
    rstd = rstd_roundings(hidden)
    return rstd + 3, 3 * rstd + additions(hidden) + 9


def dweight_roundings(rows: int, hidden: int) -> float:
    """In u of the sum of sizes of the terms dy x rstd: at most 64 rows (or, of many, an equal share of them) follow
    each other in an accumulator, the rest are added over partial sums, in blocks and pairwise: twice the logarithm. A
    term has rstd's roundings and two products."""
    return min(rows, 64) + 2 * math.log2(max(rows, 1)) + rstd_roundings(hidden) + 2


# --- the specification -----------------------------------------------------------------------------------------------


def wild(x: Tensor) -> Tensor:
    """[..., 1], rows whose sum of squares fp32 cannot hold, or fp64 for fp64: there 1 / sqrt is 0 or NaN."""
    return ~x.to(wide(x.dtype)).square().sum(-1, keepdim=True).isfinite()


def specification(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y in fp64: the reference, and of wild rows what the formula gives in fp32: 0, or NaN of inf and NaN."""
    gone = x.double() * (0 * x.double().square().sum(-1, keepdim=True).clamp(max=1))  # inf 0 is NaN
    return torch.where(wild(x), gone, rmsnorm_reference(x, weight, eps))


class Interval(NamedTuple):
    """What a gradient may be, in its own dtype: rounding is monotonic, so a sound sum lies in it, rounded too."""

    low: Tensor
    high: Tensor

    @staticmethod
    def around(value: Tensor, slack: Tensor, dtype: torch.dtype) -> Interval:
        return Interval(rounded(value - slack, dtype), rounded(value + slack, dtype))

    def holds(self, name: str, value: Tensor) -> None:
        within = (self.low <= value) & (value <= self.high) | self.low.isnan() & value.isnan()
        assert value.dtype == self.low.dtype and value.shape == self.low.shape, (name, value.dtype, value.shape)
        assert within.all(), f"{name}: {int((~within).sum())} of {within.numel()} are off, as {first(~within, value)}"


def first(wrong: Tensor, *values: Tensor) -> str:
    at = tuple(wrong.nonzero()[0].tolist())
    return f"{[value[at].item() for value in values]} at {at}"


def gradient_bounds(
    x: Tensor, weight: Tensor, dy: Tensor, eps: float, dsum: Tensor | None = None
) -> tuple[Interval, Interval]:
    """What dx and dweight may be. Of wild rows: dx is 0, or NaN where a row has inf or NaN; dweight gains 0 or NaN."""
    hidden, u = x.shape[-1], unit(wide(x.dtype))
    rows = x.numel() // hidden
    beyond, spoilt = wild(x), ~x.isfinite().all(-1, keepdim=True)
    x64, g = torch.where(beyond, 1, x.double()), weight.double() * dy.double()
    rstd = (x64.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = x64 * rstd
    of_g, of_mean = dx_roundings(hidden)
    dx = torch.where(beyond, 0, rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True)))
    slack = u * rstd * (of_g * g.abs() + of_mean * xhat.abs() * (g * xhat).abs().mean(-1, keepdim=True))
    slack = torch.where(beyond, 0, slack)
    if dsum is not None:
        dx, slack = dx + dsum.double(), slack + u * (dx.abs() + dsum.double().abs())
    dx = torch.where(spoilt, math.nan, dx)
    terms = torch.where(beyond, 0, dy.double() * xhat)
    terms = torch.where(x.isinf() | (spoilt & x.isnan().any(-1, keepdim=True)), math.nan, terms).reshape(-1, hidden)
    least = torch.finfo(wide(x.dtype)).tiny * torch.finfo(wide(x.dtype)).eps  # denormals: two products of each row
    dw_slack = dweight_roundings(rows, hidden) * u * terms.abs().sum(0) + 2 * rows * least
    if x.dtype == torch.float64:  # the reference rounds as often
        slack, dw_slack = 2 * slack, 2 * dw_slack
    return Interval.around(dx, slack, x.dtype), Interval.around(terms.sum(0), dw_slack, weight.dtype)


# --- checks ----------------------------------------------------------------------------------------------------------


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def call(norm: Norm, given: Inputs, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dweight."""
    x, weight = leaf(given.x), leaf(given.weight)
    y = norm(x, weight, eps)
    dx, dweight = torch.autograd.grad(y, (x, weight), given.dy)
    return y.detach(), dx, dweight


def assert_same(name: str, a: Tensor, b: Tensor) -> None:
    """Bit by bit."""
    assert a.shape == b.shape and a.dtype == b.dtype, (name, a.shape, b.shape, a.dtype, b.dtype)
    wrong = bits(a) != bits(b)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, as {first(wrong, a, b)}"


def assert_y(y: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    assert y.shape == x.shape and y.dtype == x.dtype, (y.shape, x.shape, y.dtype, x.dtype)
    expected = specification(x, weight, eps)
    if x.dtype in HALF:
        off, limit = ulps_apart(y, rounded(expected, x.dtype)), 1.0
    else:
        off, limit = (y.double() - expected).abs() / spacing(expected, x.dtype), y_ulps(x.shape[-1])
        off = torch.where(y.isnan() & expected.isnan(), 0, off)
        limit *= 2 if x.dtype == torch.float64 else 1  # the reference rounds as often
    wrong = ~(off <= limit)
    assert not wrong.any(), f"y is off by more than {limit:.1f} ulp, as {first(wrong, y, expected)}"


def y_is_near(norms: Norms, case: NormCase, device: str) -> None:
    given = case.inputs(device)
    with torch.no_grad():
        inferred = norms.norm(given.x, given.weight, case.eps)
    assert_y(inferred, given.x, given.weight, case.eps)
    trained = norms.norm(leaf(given.x), leaf(given.weight), case.eps)
    assert_same("y with and without gradients", trained, inferred)


def half_is_rounded(norms: Norms, case: NormCase, device: str) -> None:
    given = case.inputs(device)
    assert given.x.numel() >= 20_000, "too few to speak of 99.9%"
    y = norms.norm(given.x, given.weight, case.eps)
    right = y == rounded(specification(given.x, given.weight, case.eps), y.dtype)
    share = right.double().mean().item()
    assert share >= 0.999, f"{share:.4%} are correctly rounded"


def gradients_are_near(norms: Norms, case: NormCase, device: str) -> None:
    given = case.inputs(device)
    _, dx, dweight = call(norms.norm, given, case.eps)
    expected_dx, expected_dweight = gradient_bounds(given.x, given.weight, given.dy, case.eps)
    expected_dx.holds("dx", dx)
    expected_dweight.holds("dweight", dweight)


def wild_rows_are_as_in_fp32(norms: Norms, case: NormCase, device: str) -> None:
    y_is_near(norms, case, device)
    gradients_are_near(norms, case, device)


def each_gradient_alone(norms: Norms, case: NormCase, device: str) -> None:
    given = case.inputs(device)
    _, dx, dweight = call(norms.norm, given, case.eps)
    x, weight = leaf(given.x), leaf(given.weight)
    alone = torch.autograd.grad(norms.norm(x, given.weight, case.eps), x, given.dy)[0]
    assert_same("dx, of x alone", alone, dx)
    alone = torch.autograd.grad(norms.norm(given.x, weight, case.eps), weight, given.dy)[0]
    assert_same("dweight, of the weight alone", alone, dweight)


def sum_has_a_gradient(norms: Norms, case: NormCase, device: str) -> None:
    """Its dy is one number in memory, expanded."""
    given = case.inputs(device)
    x, weight = leaf(given.x), leaf(given.weight)
    norms.norm(x, weight, case.eps).sum().backward()
    assert x.grad is not None and weight.grad is not None
    dx, dweight = gradient_bounds(given.x, given.weight, torch.ones_like(given.x), case.eps)
    dx.holds("dx", x.grad)
    dweight.holds("dweight", weight.grad)


def rows_are_alone(norms: Norms, case: NormCase, device: str) -> None:
    """y and dx of a row: by itself, where it lies and elsewhere, and in the batch in another order."""
    given = case.inputs(device)
    y, dx, _ = call(norms.norm, given, case.eps)
    flat = [t.reshape(-1, case.hidden) for t in (given.x, given.dy, y, dx)]
    rows = len(flat[0])
    shuffle = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(rows, generator=shuffle).to(device)
    x, dy, y, dx = flat
    shuffled = call(norms.norm, given._replace(x=x[order], dy=dy[order]), case.eps)
    assert_same("y in another order", shuffled[0], y[order])
    assert_same("dx in another order", shuffled[1], dx[order])
    for at in sorted({0, rows - 1, *order[:6].tolist()} & set(range(rows))):
        for row in (slice(at, at + 1), at, slice(at, at + 3)):
            where = f"of rows {row} of {rows}"
            alone = call(norms.norm, given._replace(x=x[row], dy=dy[row]), case.eps)
            assert_same(f"y {where}", alone[0], y[row])
            assert_same(f"dx {where}", alone[1], dx[row])
        moved = call(norms.norm, given._replace(x=x[at].clone(), dy=dy[at].clone()), case.eps)
        assert_same(f"y of row {at} of {rows}, copied", moved[0], y[at])
        assert_same(f"dx of row {at} of {rows}, copied", moved[1], dx[at])


def layout_does_not_matter(norms: Norms, case: NormCase, device: str) -> None:
    """Strides and offsets change no bit of y and dx. (Rows of dweight are added in an order that they may decide.)"""
    given = case.inputs(device)
    plain = Inputs(*(tensor.contiguous().clone() for tensor in given))
    once, again = call(norms.norm, given, case.eps), call(norms.norm, plain, case.eps)
    assert_same("y", once[0], again[0])
    assert_same("dx", once[1], again[1])


def outputs_are_contiguous(norms: Norms, case: NormCase, device: str) -> None:
    for output in call(norms.norm, case.inputs(device), case.eps):
        assert output.is_contiguous(), f"an output has strides {output.stride()}"


def runs_repeat(norms: Norms, case: NormCase, device: str) -> None:
    """Also after rows of NaN, which a GPU's shared memory may still hold where a block has fewer rows than room."""
    given = case.inputs(device)
    lost = torch.full((min(600, (1 << 18) // case.hidden + 1), case.hidden), math.nan, dtype=case.dtype, device=device)
    once = call(norms.norm, given, case.eps)
    for _ in range(3):
        call(norms.norm, Inputs(lost, lost, given.weight, lost, lost), case.eps)
        for name, a, b in zip(("y", "dx", "dweight"), call(norms.norm, given, case.eps), once, strict=True):
            assert_same(f"{name} again", a, b)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_do_not_matter(norms: Norms, case: NormCase, device: str) -> None:
    given = case.inputs(device)
    with threads(1):
        once = call(norms.norm, given, case.eps)
    for count in (2, 3, 7):
        with threads(count):
            more = call(norms.norm, given, case.eps)
        for name, a, b in zip(("y", "dx", "dweight"), more, once, strict=True):
            assert_same(f"{name} with {count} threads", a, b)


def storage(tensor: Tensor) -> Tensor:
    """All bytes that a tensor's memory has."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def inputs_stay(norms: Norms, case: NormCase, device: str) -> None:
    given = case.inputs(device)
    before = [storage(tensor).clone() for tensor in given]
    call(norms.norm, given, case.eps)
    if norms.add is not None:
        call_add(norms.add, given, case.eps)
    for name, tensor, old in zip(Inputs._fields, given, before, strict=True):
        assert torch.equal(storage(tensor), old), f"{name}, or what lies around it, was written to"


def powers_of_two_pass_through(norms: Norms, case: NormCase, device: str) -> None:
    """They change no digit. Scale x, and eps by the square: y and dweight stay. Scale the weight: y and dx follow."""
    given = case.inputs(device)
    y, dx, dweight = call(norms.norm, given, case.eps)
    scaled = call(norms.norm, given._replace(x=given.x * 8), case.eps * 64)
    assert_same("y of 8 x", scaled[0], y)
    assert_same("dweight of 8 x", scaled[2], dweight)
    flipped = call(norms.norm, given._replace(weight=given.weight * -1), case.eps)
    assert torch.equal(flipped[0], -y) and torch.equal(flipped[1], -dx), "a weight of the other sign"
    if case.dtype != torch.float16:  # whose small numbers are denormal and lose digits
        scaled = call(norms.norm, given._replace(weight=given.weight * -4), case.eps)
        assert torch.equal(scaled[0], y * -4) and torch.equal(scaled[1], dx * -4), "-4 times the weight"


def call_add(
    add: AddNorm, given: Inputs, eps: float, of_y: bool = True, of_sum: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, new_residual, dx, dresidual, dweight, by the gradients of one output or both."""
    x, residual, weight = leaf(given.x), leaf(given.residual), leaf(given.weight)
    y, new = add(x, residual, weight, eps)
    outputs, gradients = [y] * of_y + [new] * of_sum, [given.dy] * of_y + [given.dsum] * of_sum
    found = torch.autograd.grad(outputs, (x, residual, weight), gradients, allow_unused=True)
    assert found[0] is not None and found[1] is not None
    dweight = torch.zeros_like(weight) if found[2] is None else found[2]
    return y.detach(), new.detach(), found[0], found[1], dweight


def add_is_its_composition(norms: Norms, case: NormCase, device: str) -> None:
    assert norms.add is not None
    given = case.inputs(device)
    new = given.x + given.residual
    expected_y, dx_of_y, dw_of_y = call(norms.norm, given._replace(x=new), case.eps)
    dx_of_both, dw_of_both = gradient_bounds(new, given.weight, given.dy, case.eps, given.dsum)
    with torch.no_grad():
        inferred = norms.add(given.x, given.residual, given.weight, case.eps)
    assert_same("y without gradients", inferred[0], expected_y)
    assert_same("new_residual without gradients", inferred[1], new)
    for of_y, of_sum in ((True, True), (True, False), (False, True)):
        y, total, dx, dresidual, dweight = call_add(norms.add, given, case.eps, of_y, of_sum)
        assert_same("y", y, expected_y)
        assert_same("new_residual", total, new)
        assert_same("the gradients of x and residual", dx, dresidual)
        if of_y and of_sum:
            dx_of_both.holds("dx of both outputs", dx)
            dw_of_both.holds("dweight of both outputs", dweight)
        elif of_y:
            assert_same("dx of y alone", dx, dx_of_y)
            assert_same("dweight of y alone", dweight, dw_of_y)
        else:
            assert torch.equal(dx, given.dsum), "dx of new_residual alone"
            assert not dweight.any(), "dweight of new_residual alone"


def add_near_wild_rows(norms: Norms, case: NormCase, device: str) -> None:
    assert norms.add is not None
    given = case.inputs(device)
    y, new, dx, _, dweight = call_add(norms.add, given, case.eps)
    assert_same("new_residual", torch.nan_to_num(new, nan=7.0), torch.nan_to_num(given.x + given.residual, nan=7.0))
    assert_y(y, new, given.weight, case.eps)
    expected_dx, expected_dweight = gradient_bounds(new, given.weight, given.dy, case.eps, given.dsum)
    expected_dx.holds("dx", dx)
    expected_dweight.holds("dweight", dweight)


# --- the table -------------------------------------------------------------------------------------------------------


class Property(NamedTuple):
    """`always` are tried first, then `examples` drawn ones; `op` is what it is a property of."""

    check: Callable[[Norms, NormCase, str], None]
    cases: Callable[[str], st.SearchStrategy[NormCase]] | None
    examples: int = 0
    always: Sequence[NormCase] = ()
    op: str = "rmsnorm"
    on_gpu: Sequence[NormCase] = ()  # always, too


DTYPES = (torch.float32, *HALF)
# Each size once, with dtypes, offsets and layouts in turn.
SIZES = [
    NormCase(
        lead=(2,) if hidden > 8192 else (5,) if i % 2 else (3, 2),
        hidden=hidden,
        dtype=DTYPES[i % 3],
        wide_weight=i % 2 == 0,
        x=Placed(LAYOUTS[i % 3], i % 8),
        dy=Placed(LAYOUTS[(i + 1) % 3], (3 * i + 1) % 8),
        weight=Placed(offset=(5 * i + 2) % 8),
        seed=i,
    )
    for i, hidden in enumerate(HIDDEN)
]
KINDS = [
    NormCase((4,), 33, dtype, magnitude=magnitude, eps=eps, seed=8)
    for dtype in DTYPES
    for magnitude in TAME
    for eps in (1e-12, 1e-1)
]
NO_ROWS = [NormCase(lead, 33, dtype) for lead in ((0,), (2, 0, 3)) for dtype in DTYPES]
# Equal elements round alike: a sum taken one by one drifts.
EQUAL = [NormCase((3,), hidden, magnitude="constant", seed=seed) for hidden in (65_536, 70_000) for seed in (0, 1)]
PLACES = [
    NormCase(lead, 40, dtype, x=Placed(layout, 1), residual=Placed(layout, 2), dy=Placed(other, 3), seed=5)
    for lead in ((2, 3), (3, 2, 2))
    for dtype, layout in zip((*DTYPES, *DTYPES), LAYOUTS, strict=False)
    for other in LAYOUTS[1::2]
]
MANY = [
    NormCase((5000,), 7),
    NormCase((5000,), 33, torch.bfloat16, seed=1),
    NormCase((2, 150), 1001, torch.float16, wide_weight=True, seed=2),
    NormCase((100,), 1001, seed=3),
    NormCase((40,), 4096, torch.bfloat16, seed=4),
    NormCase((17,), 5120, seed=5),
    NormCase((3,), 50_257, torch.float16, seed=6),
    NormCase((3,), 65_536, seed=7),
]
# Fewer rows than a block has room for.
FEW = [NormCase((3,), 7, torch.float16), NormCase((5,), 33, torch.bfloat16), NormCase((1,), 1001, seed=1)]
# Enough rows for every multiprocessor to have many, and as few as leave most of them idle.
CROWDS = [
    NormCase((5000,), 4096, torch.bfloat16),
    NormCase((20_000,), 1001, torch.float16, wide_weight=True),
    NormCase((40_000,), 64, seed=1),
    NormCase((600,), 16_384, torch.bfloat16, seed=2),
    NormCase((150,), 65_536, torch.float16, seed=3),
    NormCase((128,), 8192, seed=4),
    NormCase((1,), 8192, torch.bfloat16, seed=5),
]
ROUNDED = [
    NormCase((rows,), hidden, dtype, wide_weight=wide_weight, magnitude=magnitude, seed=hidden)
    for rows, hidden in ((3000, 8), (25, 1001), (8, 4096), (1, 65_536))
    for dtype, wide_weight, magnitude in (
        (torch.float16, False, "normal"),
        (torch.float16, True, "large"),
        (torch.bfloat16, False, "large"),
        (torch.bfloat16, True, "normal"),
    )
]
WILD_ROWS = [
    NormCase((6,), hidden, dtype, wide_weight=wide_weight, magnitude=magnitude, seed=hidden)
    for hidden in (1, 7, 4097)
    for dtype in DTYPES
    for magnitude in ("overflow", "inf", "nan", "mixed")
    for wide_weight in (False, True)
]

PROPERTIES: dict[str, Property] = {
    "y is near": Property(y_is_near, lambda on: norm_cases(device=on), 50, [*KINDS, *NO_ROWS, *EQUAL, *SIZES]),
    "half is rounded": Property(half_is_rounded, None, always=ROUNDED),
    "gradients are near": Property(
        gradients_are_near,
        lambda on: norm_cases(device=on),
        50,
        [*KINDS, *NO_ROWS, *MANY, *EQUAL, *SIZES],
        on_gpu=CROWDS,
    ),
    "wild rows are as in fp32": Property(
        wild_rows_are_as_in_fp32,
        lambda on: norm_cases(device=on, magnitudes=("mixed", "overflow", "inf", "nan"), elements=1 << 13),
        30,
        WILD_ROWS,
    ),
    "each gradient alone": Property(each_gradient_alone, lambda on: norm_cases(device=on, elements=1 << 13), 15),
    "a sum has a gradient": Property(
        sum_has_a_gradient, lambda on: norm_cases(device=on, elements=1 << 13), 15, [NormCase((3, 5), 33)]
    ),
    "rows are alone": Property(
        rows_are_alone,
        lambda on: norm_cases(device=on, magnitudes=("normal", "constant", "large")),
        25,
        MANY,
        on_gpu=CROWDS,
    ),
    "layout does not matter": Property(layout_does_not_matter, lambda on: norm_cases(device=on), 40, PLACES),
    "outputs are contiguous": Property(outputs_are_contiguous, None, always=PLACES),
    "runs repeat": Property(runs_repeat, lambda on: norm_cases(device=on), 15, [*MANY, *FEW], on_gpu=CROWDS),
    "threads do not matter": Property(threads_do_not_matter, lambda on: norm_cases(device=on), 10, MANY),
    "inputs stay": Property(inputs_stay, lambda on: norm_cases(device=on, elements=1 << 13), 20),
    "powers of two pass through": Property(
        powers_of_two_pass_through, lambda on: norm_cases(device=on, magnitudes=("normal",), elements=1 << 13), 20
    ),
    "add is its composition": Property(
        add_is_its_composition,
        lambda on: norm_cases(device=on, magnitudes=[kind for kind in TAME if kind != "large"]),
        40,
        [*NO_ROWS, *PLACES, *SIZES[::5], *MANY[1:3]],
        op="add_rmsnorm",
    ),
    "add near wild rows": Property(
        add_near_wild_rows,
        lambda on: norm_cases(device=on, magnitudes=("mixed",), elements=1 << 13),
        15,
        WILD_ROWS[:8],
        op="add_rmsnorm",
    ),
}

# The check of this one is handed outputs: see raw_kernels.
GUARDED = Property(
    lambda norms, case, device: None, lambda on: norm_cases(device=on, elements=1 << 13), 20, [*NO_ROWS, *SIZES[::3]]
)
