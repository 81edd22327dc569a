"""Cheats are failed and named, their honest twins pass: proven one by one, and through pytest and `measure`."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the cheats compute with torch")

# pytester forgets what a run imported, and numpy cannot be imported a second time: it must be there before.
import scipy.special  # noqa: E402, F401
from cheats import TABLE, TIMED_CALLS, Row, random, scaled  # noqa: E402
from suites import CONFTEST  # noqa: E402

from tinylm.bench import timing  # noqa: E402
from tinylm.bench.proof import Case, CheckFailed, Proof  # noqa: E402

pytest_plugins = ["pytester"]

IDS = [f"{row.cheat}: {row.disguise}" for row in TABLE]
Prove = Callable[[Callable[[str], Case]], None]


@functools.cache
def gpu() -> Any:
    from tinylm.bench.device import Gpu

    return Gpu()


@pytest.fixture(params=["cpu", "cuda"])
def prove(request: pytest.FixtureRequest) -> Iterator[Prove]:
    """Proof, calls, and proof again, as `measure` does it."""
    device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def run(make: Callable[[str], Case]) -> None:
        case = make(device)
        proof = Proof(case, gpu() if device == "cuda" else None, "cold" if device == "cuda" else "host")
        args, _ = proof.before()
        for _ in range(TIMED_CALLS):
            case.fn(*args)
        proof.after(lambda: case.fn(*args), args)

    with torch.cuda.stream(gpu().stream) if device == "cuda" else nullcontext():
        yield run


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_a_cheat_is_failed_and_named(row: Row, prove: Prove) -> None:
    with pytest.raises(CheckFailed, match=row.words) as caught:
        prove(row.wrong)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_its_honest_twin_passes(row: Row, prove: Prove) -> None:
    prove(row.honest)


@pytest.mark.parametrize("module", [time, timing], ids=["time.perf_counter", "the clock of timing.host"])
def test_a_clock_that_is_slow_while_it_is_used(module: Any, monkeypatch: pytest.MonkeyPatch, prove: Prove) -> None:
    name = "perf_counter" if module is time else "_now"
    real = getattr(module, name)
    calls = [0]
    monkeypatch.setattr(module, name, real)  # to be put back

    def slowing(x: Any, w: Any) -> Any:
        calls[0] += 1
        if calls[0] == TIMED_CALLS:
            setattr(module, name, lambda: real() / 2)
        return x * w

    with pytest.raises(CheckFailed, match="patched timing"):
        prove(lambda device: Case(slowing, random(device)))


def test_a_clock_that_is_only_read(prove: Prove) -> None:
    prove(lambda device: Case(lambda x, w: (time.perf_counter(), scaled(x, w))[1], random(device)))


# --- through pytest --------------------------------------------------------------------------------------------------

# Where tinylm is installed, its entry point loads the plugin; in a bare checkout it is named.
INSTALLED = any(entry.name == "tinylm.bench.plugin" for entry in importlib.metadata.entry_points(group="pytest11"))
LOADED = [] if INSTALLED else ["-p", "tinylm.bench.plugin"]
FEW = ["--max-samples=3", "--min-samples=3", "--cell-seconds=0.1"]

SUITE = """
import pytest
from test_cheats import FIRST

@pytest.mark.parametrize("side", ["wrong", "honest"])
@pytest.mark.parametrize("cheat", FIRST)
def test_it(measure, cheat, side):
    case = getattr(FIRST[cheat], side)(measure.device)
    measure(case.fn, inputs=case.inputs, check=case.check, mutates=case.mutates, constant=case.constant)
"""

# One disguise of each. From a CUDA graph the work is called too rarely for one that counts its calls.
FIRST = {row.cheat: row for row in reversed(TABLE) if not row.later}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cheat_is_a_failed_cell_of_the_run(device: str, pytester: pytest.Pytester) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytester.makepyfile(bench_it=SUITE)
    command = [*LOADED, f"--device={device}", "bench_it.py", "--benchmark-json=out.json", *FEW]
    pytester.runpytest_inprocess(*command).assert_outcomes(passed=len(FIRST), failed=len(FIRST))
    data = json.loads((pytester.path / "out.json").read_text(encoding="utf-8"))
    assert {cell["params"]["side"] for cell in data["benchmarks"]} == {"honest"}
    reasons = {cell["params"]["cheat"]: cell["reason"] for cell in data["failed"]}
    assert set(reasons) == set(FIRST)
    for cheat, reason in reasons.items():
        assert re.search(FIRST[cheat].words, reason)


def test_a_suite_without_torch_is_proven_too(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        bench_it="""
import math

def test_lazy(measure):
    measure(lambda: (x * x for x in range(100)))

def test_nan(measure):
    measure(lambda: [1.0, math.nan])

def test_honest(measure):
    measure(lambda: [x * x for x in range(100)], check=lambda squares: float(squares[7] != 49))
"""
    )
    command = [*LOADED, "--device=cpu", "bench_it.py", "--benchmark-json=out.json", *FEW]
    pytester.runpytest_subprocess(*command).assert_outcomes(passed=1, failed=2)
    data = json.loads((pytester.path / "out.json").read_text(encoding="utf-8"))
    lazy, nan = (cell["reason"] for cell in data["failed"])
    assert "unfinished" in lazy and "NaN output" in nan
