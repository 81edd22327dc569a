"""Cheats that need a GPU: streams that are not waited for, a cache that is not cold, clocks that lie."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="the cheats compute with torch")

# pytester forgets what a run imported, and numpy cannot be imported a second time: it must be there before.
import scipy.special  # noqa: E402, F401
from cheats import CHECK  # noqa: E402

from tinylm.bench.proof import Case, CheckFailed, Proof  # noqa: E402

ROWS, HIDDEN = 2048, 1024  # 8 MiB of fp32: some microseconds of work, and a fraction of the L2 cache of an H200
LONG_ROWS = 16 * ROWS

pytest_plugins = ["pytester"]

Patch = pytest.MonkeyPatch


def inputs(rows: int = ROWS) -> tuple[Any, ...]:
    return torch.randn(rows, HIDDEN, device="cuda"), torch.randn(HIDDEN, device="cuda")


def scaled(x: Any, w: Any) -> Any:
    return x * w


# --- work on a side stream -------------------------------------------------------------------------------------------


def beside(forks: bool, joins: bool) -> Callable[..., Any]:
    """The product computed on another stream, which waits for this one (forks) and is waited for (joins), or not."""
    side = torch.cuda.Stream()

    def fn(x: Any, w: Any) -> Any:
        here = torch.cuda.current_stream()
        if forks:
            side.wait_stream(here)
        with torch.cuda.stream(side):
            y = x * w
        if joins:
            here.wait_stream(side)
            y.record_stream(here)
        return y

    return fn


def half_beside(joins: bool) -> Callable[..., Any]:
    """Memory of this stream, half of which another stream writes without waiting for it."""
    side = torch.cuda.Stream()

    def fn(x: Any, w: Any) -> Any:
        here, half = torch.cuda.current_stream(), ROWS // 2
        y = torch.empty_like(x)
        if joins:
            side.wait_stream(here)
        torch.mul(x[:half], w, out=y[:half])
        with torch.cuda.stream(side):
            torch.mul(x[half:], w, out=y[half:])
        if joins:
            here.wait_stream(side)
        return y

    return fn


# --- a warm cache under `cold`, and clocks ---------------------------------------------------------------------------


def no_flush(patch: Patch, gpu: Any) -> None:
    patch.setattr(gpu, "flush", lambda: None)


def small_flush(patch: Patch, gpu: Any) -> None:
    """Of an eighth of the cache."""
    count = gpu.properties.L2_cache_size // 8 // 8
    vars(gpu).pop("_flush", None)
    gpu._flush = gpu._reader(torch.randint(1 << 62, (count,), dtype=torch.int64, device="cuda"))


def half_the_time(patch: Patch, gpu: Any) -> None:
    real = torch.cuda.Event.elapsed_time
    patch.setattr(torch.cuda.Event, "elapsed_time", lambda start, end: real(start, end) / 2)


def no_wait_for_events(patch: Patch, gpu: Any) -> None:
    """A synchronize that does not wait, and a time that was fixed in advance."""
    patch.setattr(torch.cuda.Event, "synchronize", lambda event: None)
    patch.setattr(torch.cuda.Event, "elapsed_time", lambda start, end: 1e-3)


def no_wait_for_the_device(patch: Patch, gpu: Any) -> None:
    patch.setattr(torch.cuda, "synchronize", lambda device=None: None)


def nothing(patch: Patch, gpu: Any) -> None:
    pass


class Row(NamedTuple):
    cheat: str
    disguise: str
    words: str
    mode: str
    wrong: Callable[[], Callable[..., Any]]
    honest: Callable[[], Callable[..., Any]]
    plant: Callable[[Patch, Any], None] = nothing  # what is done beside the work, and not by its twin


def plain() -> Callable[..., Any]:
    return scaled


def long() -> Callable[..., Any]:
    """So long that the device is still at work when the host has queued all of it: 2 ms on an H200, with LONG_ROWS."""

    def fn(x: Any, w: Any) -> Any:
        for _ in range(30):
            y = x * w
        return y

    return fn


TABLE = [
    Row("side stream", "not forked", "side stream", "cold", lambda: beside(False, False), lambda: beside(True, True)),
    Row("side stream", "not joined", "side stream", "cold", lambda: beside(True, False), lambda: beside(True, True)),
    Row("side stream", "half of it", "side stream: 0.5", "hot", lambda: half_beside(False), lambda: half_beside(True)),
    Row("hot in cache", "no flush", "hot in cache", "cold", plain, plain, no_flush),
    Row("hot in cache", "a small flush", "hot in cache", "cold", plain, plain, small_flush),
    Row("patched timing", "half the time", "patched timing: torch.cuda.Event", "hot", plain, plain, half_the_time),
    Row("patched timing", "no wait", "patched timing: torch.cuda.Event", "cold", plain, plain, no_wait_for_events),
    Row("patched timing", "no wait at all", "patched timing: synchronize", "host", long, long, no_wait_for_the_device),
]
IDS = [f"{row.cheat}: {row.disguise}, {row.mode}" for row in TABLE]


@pytest.fixture
def gpu() -> Iterator[Any]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from tinylm.bench.device import Gpu

    found = Gpu()  # one each, since some cheats spoil it
    with torch.cuda.stream(found.stream):
        yield found
    torch.cuda.synchronize()


def prove(gpu: Any, mode: str, fn: Callable[..., Any], given: Callable[[], tuple[Any, ...]] = inputs) -> None:
    sync = (lambda: torch.cuda.synchronize()) if mode == "host" else None
    proof = Proof(Case(fn, given, CHECK), gpu, mode, sync)
    args, _ = proof.before()
    for _ in range(10):
        fn(*args)
    proof.after(lambda: fn(*args), args)


def rows(row: Row) -> Callable[[], tuple[Any, ...]]:
    return (lambda: inputs(LONG_ROWS)) if row.wrong is long else inputs


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_a_cheat_is_failed_and_named(row: Row, gpu: Any, monkeypatch: Patch) -> None:
    row.plant(monkeypatch, gpu)
    with pytest.raises(CheckFailed, match=row.words):
        prove(gpu, row.mode, row.wrong(), rows(row))


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_its_honest_twin_passes(row: Row, gpu: Any) -> None:
    prove(gpu, row.mode, row.honest(), rows(row))


@pytest.mark.parametrize("mode", ["cold", "hot"])
def test_work_of_many_kernels_passes(mode: str, gpu: Any) -> None:
    def many(x: Any, w: Any) -> Any:
        for _ in range(300):
            y = x * w
        return y

    prove(gpu, mode, many)


def test_short_work_passes(gpu: Any) -> None:
    prove(gpu, "cold", scaled, lambda: (torch.randn(1, 1024, device="cuda"), torch.randn(1024, device="cuda")))


def test_work_that_waits_for_the_device_is_left_to_the_timing(gpu: Any) -> None:
    prove(gpu, "cold", lambda x, w: x * w if x.sum().item() < 1e9 else None)


def test_replays_of_a_graph_are_proven(gpu: Any) -> None:
    """What is called in passing a graph's capture is not the work: here it leaves out half."""

    def captured(fn: Callable[..., Any]) -> None:
        proof = Proof(Case(fn, inputs, CHECK), gpu, "graph")
        args, _ = proof.before()
        results: list[Any] = []
        graph = gpu.capture(lambda: results.append(fn(*args)))
        proof.after(lambda: (graph.replay(), results[0])[1], args)

    def half(x: Any, w: Any) -> Any:
        y = torch.empty_like(x)
        rows = ROWS // 2 if torch.cuda.is_current_stream_capturing() else ROWS
        torch.mul(x[:rows], w, out=y[:rows])
        return y

    captured(scaled)
    with pytest.raises(CheckFailed, match="not written"):
        captured(half)


SUITE = """
import pytest
import torch
from test_cheats_cuda import CHECK, beside, inputs, scaled

def absent():
    kept = []
    def fn(x, w):
        if torch.cuda.is_current_stream_capturing():
            return kept[-1].view_as(x)
        kept[:] = [x * w]
        return kept[-1]
    return fn

MAKE = {
    "not forked": lambda: beside(False, False),
    "not joined": lambda: beside(True, False),
    "joined": lambda: beside(True, True),
    "absent from the graph": absent,
    "present": lambda: scaled,
}

@pytest.mark.parametrize("name", list(MAKE))
def test_it(measure, name):
    measure(MAKE[name](), inputs=lambda: inputs(16384), check=CHECK)
"""


def test_a_cheat_is_a_failed_cell_of_the_run(gpu: Any, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(bench_it=SUITE)
    installed = any(e.name == "tinylm.bench.plugin" for e in importlib.metadata.entry_points(group="pytest11"))
    loaded = [] if installed else ["-p", "tinylm.bench.plugin"]
    command = [*loaded, "--device=cuda", "bench_it.py", "--benchmark-json=out.json", "--max-samples=20"]
    pytester.runpytest_inprocess(*command).assert_outcomes(passed=2, failed=3)
    data = json.loads((pytester.path / "out.json").read_text(encoding="utf-8"))
    assert {cell["params"]["name"] for cell in data["benchmarks"]} == {"joined", "present"}
    reasons = {cell["params"]["name"]: cell["reason"] for cell in data["failed"]}
    assert "side stream" in reasons["not forked"] and "side stream" in reasons["not joined"]
