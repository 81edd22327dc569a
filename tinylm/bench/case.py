"""What is measured, and the check of its result against a reference.

A norm over a million rows does not notice that one of them was skipped, so every element is looked at as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# How far one element may be off, as a multiple of the tolerance, which bounds the root mean square of the errors in
# units of the result's. Rounding errors that add up are about normal, and the largest of 1e12 normal numbers is 7.1
# standard deviations.
ELEMENT_FACTOR = 8.0
# An element that was never computed is off by all of itself, so the limit has to stay below 1 for any tolerance.
ELEMENT_LIMIT = 0.75
# Elements compared at a time: 32 MiB of fp64, of which about five are alive.
CHUNK = 1 << 22


class CheckFailed(AssertionError):
    """The work's result, or the way it came about, is not what it claims to be: the cell fails, and has no time."""


@dataclass(frozen=True)
class Case:
    """One implementation to be measured.

    fn(*inputs()) is the work. check(result, *args) gets the result on fresh inputs; it returns the error against
    the reference (a float) or None, and raises AssertionError if the result is wrong.
    """

    fn: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]] = tuple
    check: Callable[..., float | None] | None = None
    # fn may change its inputs, or state of its own that it returns. The check then gets the inputs as they were (if fn
    # returns None: as they are now).
    mutates: bool = False
    constant: bool = False  # the values of the inputs do not matter, so that zeros will do


def checked(check: Callable[..., float | None] | None, result: Any, args: tuple[Any, ...]) -> float | None:
    """The error that a check gives; raises CheckFailed where that is no number."""
    error = None if check is None else check(result, *args)
    if error is not None and not math.isfinite(error):
        raise CheckFailed(f"the check gives an error of {error}: a result that is not finite is wrong")
    return error


def against(reference: Callable[..., Any], tolerance: float) -> Callable[..., float]:
    """A check: the largest ||result - reference|| / ||reference||, over all tensors returned, is within `tolerance`.

    reference(*args) gets the same inputs and should compute in fp64; the norms are taken in fp64. A result that is
    not finite where the reference is finite fails. So does a single element that is off by more than 8 times the
    tolerance (at most 0.75) of the largest of: itself, its row's root mean square (a row runs along the last
    dimension), the whole tensor's. The last is the floor for rows of almost nothing, where rounding errors come from
    larger numbers that cancelled.
    """

    def check(result: Any, *args: Any) -> float:
        expected = reference(*args)
        results, expecteds = (
            tuple(value) if isinstance(value, (tuple, list)) else (value,) for value in (result, expected)
        )
        if len(results) != len(expecteds):
            raise CheckFailed(f"{len(results)} results where the reference gives {len(expecteds)}")
        return max((_compared(got, want, tolerance) for got, want in zip(results, expecteds, strict=True)), default=0.0)

    return check


def _compared(got: Any, want: Any, tolerance: float) -> float:
    """The relative error of one tensor; raises CheckFailed if it is too large, all over or in a few places."""
    import torch

    if not isinstance(got, torch.Tensor):
        raise CheckFailed(f"the work returned {_kind(got)} where the reference gives a tensor")
    if got.shape != want.shape:
        raise CheckFailed(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if want.numel() == 0:
        return 0.0
    limit = max(tolerance, min(ELEMENT_FACTOR * tolerance, ELEMENT_LIMIT))
    columns = want.shape[-1] if want.ndim > 1 else 1
    got, want = (tensor.detach().reshape(-1, columns) for tensor in (got, want))
    if not want.is_floating_point() or want.itemsize == 1:
        want = want.double()
    norm = torch.linalg.vector_norm(want, dtype=torch.float64)
    finite = bool(norm.isfinite())
    if not finite:  # a mask's infinities are right where the reference has them, and have no size
        norm = torch.linalg.vector_norm(want.double().nan_to_num(0.0, 0.0, 0.0))
    floor = norm / math.sqrt(want.numel())

    squares, wrong = [], []
    columns_wrong = torch.zeros(columns, dtype=torch.bool, device=want.device)
    step = max(1, CHUNK // columns)
    for start in range(0, len(want), step):
        g, w = got[start : start + step].double(), want[start : start + step].double()
        e = (g - w).abs_()
        if not finite:
            e.masked_fill_((g == w) | (g.isnan() & w.isnan()), 0.0)
            w = w.nan_to_num(0.0, 0.0, 0.0)
        squares.append(torch.linalg.vector_norm(e).square())
        if e.max() <= limit * floor:  # as most are: nothing is too far off for any row
            wrong.append(torch.zeros(len(e), dtype=torch.bool, device=e.device))
            continue
        row = torch.linalg.vector_norm(w, dim=-1, keepdim=True) / math.sqrt(columns)
        far = (e <= w.abs().clamp_min_(floor).maximum(row).mul_(limit)).logical_not_()
        wrong.append(far.any(-1))
        columns_wrong |= far.any(0)
    error = (torch.stack(squares).sum().sqrt() / norm.clamp_min(1e-300)).item()
    found = [("row" if columns > 1 else "element", torch.cat(wrong)), ("column", columns_wrong)]
    name, mask = min(found, key=lambda named: named[1].double().mean().item())
    bad = mask.nonzero()[:, 0].tolist()
    if bad and (2 * len(bad) <= len(mask) or error <= tolerance):
        at = (..., bad[0]) if name == "column" else bad[0]
        raise CheckFailed(
            f"skips {name}s: {len(bad)} of {len(mask)} {name}s are wrong although the others are right, the first is "
            f"{name} {bad[0]} ({_look(got[at], want[at], limit)}); relative error overall {error:.3g}"
        )
    if not error <= tolerance:
        raise CheckFailed(f"relative error {error:.3g} against the reference, tolerance {tolerance:.3g}")
    return error


def _look(got: Any, want: Any, limit: float) -> str:
    """What is wrong with a row."""
    if not got.any() and want.any():
        return "all zeros"
    return "all NaN" if got.isnan().all() else f"off by more than {limit:.2g} of its size"


def _kind(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
