"""Benchmarks that cheat, each in two disguises beside an honest twin.

A row's two functions make a case from a device, on the CPU or on a GPU; whatever a cheat remembers begins with its
case. Cheats that need a GPU are in test_cheats_cuda.py.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from tinylm.bench.proof import Case, against

ROWS = HIDDEN = 64
CHECK = against(lambda x, w: x.double() * w.double(), 1e-6)
# A cheat that waits until it is timed: a GPU's proof calls it some hundreds of times before.
LATER = 1000 if torch.cuda.is_available() else 2
TIMED_CALLS = LATER + 3


def scaled(x: Any, w: Any) -> Any:
    return x * w


def random(device: str) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(ROWS, HIDDEN, device=device), torch.randn(HIDDEN, device=device))


def case(fn: Callable[..., Any], **how: Any) -> Callable[[str], Case]:
    """The same for any device, of the function itself or of one that makes it."""
    return lambda device: Case(fn, **{"inputs": random(device), "check": CHECK} | how)


def made(make: Callable[[], Callable[..., Any]], **how: Any) -> Callable[[str], Case]:
    return lambda device: case(make(), **how)(device)


# --- cached output ---------------------------------------------------------------------------------------------------


def kept_by_pointer() -> Callable[..., Any]:
    kept: dict[Any, Any] = {}

    def fn(x: Any, w: Any) -> Any:
        key = (x.data_ptr(), x.shape, x._version)
        if key not in kept:
            kept[key] = x * w
        return kept[key]

    return fn


def kept_and_copied() -> Callable[..., Any]:
    kept: dict[int, Any] = {}

    def fn(x: Any, w: Any) -> Any:
        if id(x) not in kept:
            kept[id(x)] = x * w
        return kept[id(x)].clone()

    return fn


def workspace_by_pointer() -> Callable[..., Any]:
    kept: dict[int, Any] = {}
    return lambda x, w: torch.mul(x, w, out=kept.setdefault(x.data_ptr(), torch.empty_like(x)))


# --- lazily unfinished -----------------------------------------------------------------------------------------------


def in_background(waits: bool) -> Callable[..., Any]:
    def fn(x: Any, w: Any) -> Any:
        y = torch.zeros_like(x)
        stream = torch.cuda.current_stream() if x.is_cuda else None

        def fill() -> None:
            time.sleep(0.02)
            with torch.cuda.stream(stream):
                torch.mul(x, w, out=y)

        thread = threading.Thread(target=fill)
        thread.start()
        if waits:
            thread.join()
        return y

    return fn


def rows_of(x: Any, w: Any) -> Iterator[Any]:
    return (row * w for row in x)


# --- output not written ----------------------------------------------------------------------------------------------


def half(x: Any, w: Any) -> Any:
    y = torch.empty_like(x)
    torch.mul(x[: ROWS // 2], w, out=y[: ROWS // 2])
    return y


def halves(x: Any, w: Any) -> Any:
    y = torch.empty_like(x)
    for rows in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS)):
        torch.mul(x[rows], w, out=y[rows])
    return y


def buffered(once: bool) -> Callable[..., Any]:
    buffer: list[Any] = []

    def fn(x: Any, w: Any) -> Any:
        if not buffer:
            buffer.append(x * w)
        elif not once:
            torch.mul(x, w, out=buffer[0])
        return buffer[0]

    return fn


# --- inputs ----------------------------------------------------------------------------------------------------------


def zeros(device: str) -> Case:
    return Case(scaled, lambda: (torch.zeros(ROWS, HIDDEN, device=device), torch.randn(HIDDEN, device=device)), CHECK)


def mostly_zeros(device: str) -> Case:
    def inputs() -> tuple[Any, ...]:
        x, w = random(device)()
        x[: ROWS // 2 + 1] = 0
        return x, w

    return Case(scaled, inputs, CHECK)


def weight_of_ones(device: str) -> Case:
    return Case(scaled, lambda: (torch.randn(ROWS, HIDDEN, device=device), torch.ones(HIDDEN, device=device)), CHECK)


def mutating_later() -> Callable[..., Any]:
    """Only once it is being timed, and through a view."""
    calls = [0]

    def fn(x: Any, w: Any) -> Any:
        calls[0] += 1
        y = x * w
        if calls[0] > LATER:
            x.view(-1)[:7].fill_(0)
        return y

    return fn


# --- right once, and wrong in places ---------------------------------------------------------------------------------


def wrong_later(wrong: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = [calls]

    def fn(x: Any, w: Any) -> Any:
        left[0] -= 1
        return x * w if left[0] >= 0 else wrong(x, w)

    return fn


def first_answer() -> Callable[..., Any]:
    answer: list[Any] = []

    def fn(x: Any, w: Any) -> Any:
        if not answer:
            answer.append(x * w)
        return answer[0].clone()

    return fn


def planned_once() -> Callable[..., Any]:
    plan: list[int] = []

    def fn(x: Any, w: Any) -> Any:
        plan[:] = plan or range(0, ROWS, 16)
        return torch.cat([x[start : start + 16] * w for start in plan])

    return fn


def but_for(index: Any, value: float) -> Callable[..., Any]:
    def fn(x: Any, w: Any) -> Any:
        y = x * w
        y[index] = value
        return y

    return fn


# --- exceptions and NaN ----------------------------------------------------------------------------------------------


def swallowing(x: Any, w: Any) -> Any:
    try:
        return x * w[:3]
    except RuntimeError:
        return None


def falling_back(x: Any, w: Any) -> Any:
    try:
        return x * w[:3]
    except RuntimeError:
        return x * w


def swallowing_later(calls: int) -> Callable[..., Any]:
    buffer: list[Any] = []

    def fn(x: Any, w: Any) -> Any:
        with contextlib.suppress(RuntimeError):
            buffer.append(x * (w if len(buffer) < calls else w[:3]))
        return buffer[-1]

    return fn


def lenient(result: Any, x: Any, w: Any) -> float:
    """As of an author who forgot that NaN is not larger than anything."""
    assert not ((result - x * w).abs() > 1e-5).any()
    return 0.0


def nan_inputs(device: str) -> Case:
    def inputs() -> tuple[Any, ...]:
        x, w = random(device)()
        x[3, 5] = torch.nan
        return x, w

    return Case(scaled, inputs, lenient)


class Row(NamedTuple):
    cheat: str
    disguise: str
    words: str  # a pattern of the message
    wrong: Callable[[str], Case]
    honest: Callable[[str], Case]
    later: bool = False  # it begins to cheat after LATER calls


TABLE = [
    Row("cached", "by pointer and version", "cached output", made(kept_by_pointer), made(workspace_by_pointer)),
    Row("cached", "by identity, copied", "cached output", made(kept_and_copied), case(scaled)),
    Row("unfinished", "a generator", "generator", case(rows_of), case(lambda x, w: torch.stack(list(rows_of(x, w))))),
    Row(
        "unfinished",
        "a thread fills it in later",
        "unfinished|side stream",
        made(lambda: in_background(False)),
        made(lambda: in_background(True)),
    ),
    # A host's heap does not always give out the memory that was spoiled; a GPU's allocator does.
    Row("not written", "the second half", "not written|skips rows: 32", case(half), case(halves)),
    Row(
        "not written",
        "a buffer filled by the first call",
        "not written",
        made(lambda: buffered(once=True), check=None),
        made(lambda: buffered(once=False), check=None),
    ),
    Row("zero inputs", "all zeros", "zero inputs: 98%", zeros, case(scaled)),
    Row("zero inputs", "more than half zeros", "zero inputs: 98%", mostly_zeros, weight_of_ones),
    Row("right once", "the first answer for all", "cached output", made(first_answer), made(planned_once)),
    Row(
        "right once",
        "wrong once it is timed",
        "right once",
        made(lambda: wrong_later(lambda x, w: x + w, LATER)),
        made(lambda: wrong_later(lambda x, w: w * x, LATER)),
        later=True,
    ),
    Row("skips rows", "one row of zeros", "skips rows: 1 of 64", case(but_for(17, 0.0)), case(halves)),
    Row("skips rows", "the end of each", "skips columns: 1 of 64", case(but_for((..., -1), 0.0)), made(planned_once)),
    Row(
        "mutates",
        "in place",
        "mutates its inputs: tensor 0",
        case(lambda x, w: x.mul_(w)),
        case(lambda x, w: x.mul_(w), mutates=True),
    ),
    Row("mutates", "later, by a view", "mutates its inputs: tensor 0", made(mutating_later), case(scaled), True),
    Row(
        "swallowed",
        "gives None",
        "an exception was swallowed in the work: RuntimeError",
        case(swallowing),
        case(falling_back),
    ),
    Row(
        "swallowed",
        "gives an older result, later",
        "an exception was swallowed in the work: RuntimeError",
        made(lambda: swallowing_later(LATER)),
        made(lambda: swallowing_later(10**9)),
        later=True,
    ),
    Row("NaN", "nothing checks it", "NaN output: 4096", case(lambda x, w: x * 0 / 0, check=None), case(scaled)),
    Row("NaN", "a check that misses it", "NaN output: 1", case(but_for((3, 5), torch.nan), check=lenient), nan_inputs),
]
