"""What a run survives: kills at random moments, cells that end their process or lose its context, too little memory."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from suites import CONFTEST, Forking, Suite

posix = pytest.mark.skipif(os.name != "posix", reason="signals end processes in this way on POSIX systems only")

MANY = """
@pytest.mark.parametrize("n", range(1, 121))
def test_cell(measure, n):
    time.sleep(0.006)
    measured(measure, f"test_cell[{n}]", n)
"""


def written(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


@posix
def test_twenty_kills_at_random_moments_lose_no_finished_cell(tmp_path: Path) -> None:
    suite, moments = Suite(tmp_path, MANY), random.Random(20)
    runs = Forking(suite)
    finished: dict[str, list[float]] = {}
    called: dict[str, int] = {}
    for kill in range(20):
        resume = ["--resume=out.json"] if suite.journal.exists() else []
        before = len(written(suite.journal))
        pid = runs.start("--in-process", *resume)
        if kill % 4:  # three of four are killed while they measure, the others at any moment
            while b'{"start"' not in written(suite.journal)[before:] and psutil.pid_exists(pid):
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.06))
        else:
            time.sleep(moments.uniform(0, 0.5))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = runs.status()
        if status == 0:  # a fast machine is done before the twentieth
            break
        assert status == -signal.SIGKILL
        now = {line["name"]: line["data"] for line in suite.lines() if "fullname" in line}
        assert now == now | finished  # nothing that was there is gone, or another
        assert {name: suite.calls[name] for name in called} == called  # or is measured again
        finished, called = now, {name: suite.calls[name] for name in now}
    assert finished
    runs.start("--in-process", "--resume=out.json")
    assert runs.status() == 0, suite.output.read_text()
    runs.close()
    benchmarks = {cell["name"]: cell["stats"]["data"] for cell in suite.document["benchmarks"]}
    assert len(benchmarks) == len(suite.document["benchmarks"]) == 120
    assert benchmarks == benchmarks | finished
    assert suite.document["failed"] == suite.document["skipped"] == []
    # What was finished at a kill was not measured again, and every other call belongs to a start without an end.
    assert {name: suite.calls[name] for name in called} == called
    starts = [line["start"] for line in suite.lines() if "start" in line]
    ends = [line["fullname"] for line in suite.lines() if "fullname" in line]
    assert len(set(ends)) == len(ends) == 120 and sum(suite.calls.values()) <= len(starts)


# Stands for a torch whose context is lost by one cell, and fails from then on.
LOST = """
import sys, types

class Cuda:
    lost = False
    is_initialized = staticmethod(lambda: True)
    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

sys.modules["torch"] = types.SimpleNamespace(__version__="0", cuda=Cuda())
"""
WITH_LOST = CONFTEST.replace('import sys\n\nsys.modules["torch"] = None\n', LOST)

ENDS = """
def work(measure, name):
    import torch
    torch.cuda.synchronize()
    measured(measure, name)

def test_first(measure):
    work(measure, "first")

def test_wrong(measure):
    call("wrong")
    raise ValueError("a failure of another kind")

@pytest.mark.parametrize("how", os.environ["HOW"].split())
def test_ends(measure, how):
    call(how)
    if how == "context":
        import torch
        torch.cuda.lost = True
        torch.cuda.synchronize()
    os._exit(0) if how == "exit" else os.kill(os.getpid(), getattr(signal, how))

def test_last(measure):
    work(measure, "last")
"""
POISONED = "poisoned the CUDA context: RuntimeError: CUDA error: an illegal memory access was encountered"


@posix
def test_cells_that_end_their_process_are_recorded_and_the_rest_is_measured(tmp_path: Path) -> None:
    suite = Suite(tmp_path, ENDS, WITH_LOST)
    status, output = suite.run(HOW="SIGSEGV context exit SIGKILL")
    assert status == 1, output
    assert suite.names("measured") == ["first", "last"]
    reasons = {cell["name"]: cell["reason"] for cell in suite.document["failed"]}
    assert reasons == {
        "test_wrong": "ValueError: a failure of another kind",
        "test_ends[SIGSEGV]": "crashed: the process was ended by SIGSEGV",
        "test_ends[context]": POISONED,
        "test_ends[exit]": "crashed: the process ended with exit code 0 and no result",
        "test_ends[SIGKILL]": "crashed: the process was ended by SIGKILL (the system's out-of-memory killer sends it)",
    }
    crashed = [cell for cell in suite.document["failed"] if cell["extra_info"].get("crashed")]
    assert {cell["group"] for cell in crashed} == {f"ends {cell['params']['how']}" for cell in crashed}
    assert len(crashed) == 4 and output.count("the rest runs in a fresh process") == 4
    assert set(suite.calls.values()) == {1} and len(suite.calls) == 7


def test_in_one_process_a_crash_ends_the_run_and_the_cell_is_tried_again(tmp_path: Path) -> None:
    suite = Suite(tmp_path, ENDS, WITH_LOST)
    suite.run("--in-process", HOW="exit")
    assert not suite.json.exists() or not suite.json.stat().st_size
    # The context is lost: nothing after it is measured, and the user is told how to go on.
    status, output = suite.run("--in-process", "--resume=out.json", HOW="context exit")
    assert status == 2 and "--resume" in output and suite.names("measured") == ["first"]
    assert suite.names("failed") == ["wrong", "ends[context]"]
    assert suite.calls == {"first": 1, "wrong": 1, "exit": 1, "context": 1}


@posix
def test_the_measuring_process_dies_with_its_supervisor(tmp_path: Path) -> None:
    suite = Suite(
        tmp_path,
        """
def test_it(measure):
    if not (HERE / "calls.txt").exists():
        call("waits")
        time.sleep(60)
    measured(measure, "it")
""",
    )
    process = suite.start()
    while not suite.calls:
        time.sleep(0.01)
    (header, start) = suite.lines()
    assert header["pid"] != process.pid and start["name"] == "test_it"
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while running(header["pid"]) and time.monotonic() < until:
        time.sleep(0.01)
    assert not running(header["pid"])
    # It was ended from outside: nothing says that the cell is at fault.
    status, output = suite.run("--resume=out.journal.jsonl")
    assert status == 0 and suite.names("measured") == ["it"], output


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # an orphan that nobody reaps has ended
    except psutil.NoSuchProcess:
        return False


LARGE = """
LIMIT = 64

@cells(quick=[dict(impl=["a", "b"], batch=[1, 8], context=[4, 16]), dict(impl=["a"], batch=[2, 32], context=[4])])
def test_it(measure, impl, batch, context):
    call(f"{impl}-{batch}-{context}")
    if impl == "a" and batch * context >= 32:
        measure.extra_info["predicted_bytes"] = batch * context
        raise MemoryError("too large")
    measure.samples([0.5], timing="host")
"""


def test_what_is_larger_than_a_cell_that_ran_out_is_not_tried(tmp_path: Path) -> None:
    suite = Suite(tmp_path, LARGE)
    status, output = suite.run("--in-process", "-k", "not b8-c16")
    assert status == 0, output
    found = {cell["name"]: (cell["reason"], cell["extra_info"]) for cell in suite.document["skipped"]}
    smallest = "test_it[a-b8-c4]"
    assert found == {
        smallest: ("out of memory: too large", {"predicted_bytes": 32, "out_of_memory": True}),
        # Its own sizes are no reading: that it does not fit is only inferred.
        "test_it[a-b32-c4]": (f"larger than one that ran out of memory: {smallest}", {"larger_than": smallest}),
    }
    # The same sizes of another implementation, and smaller ones, are tried.
    assert sorted(suite.names("measured")) == ["it[a-b1-c16]", "it[a-b1-c4]", "it[a-b2-c4]", *BS]
    # It holds for what is resumed as well; a cell that ran out is tried again when that is asked for.
    status, output = suite.run("--in-process", "--resume=out.json")
    assert status == 0 and suite.calls == dict.fromkeys(suite.calls, 1) | {"b-8-16": 1}, output
    assert {cell["name"] for cell in suite.document["skipped"]} == {*found, "test_it[a-b8-c16]"}
    status, output = suite.run("--in-process", "--resume=out.json", "--retry")
    assert suite.calls == dict.fromkeys(suite.calls, 1) | {"a-8-4": 2}


BS = ["it[b-b1-c16]", "it[b-b1-c4]", "it[b-b8-c4]"]

ILLEGAL = """
import torch

def work(size):
    return torch.ones(size, device="cuda").sum().item()

def test_first(measure):
    call("first")
    measure(lambda: work(8), timing="host")

def test_poisons(measure):
    call("poisons")
    rows = torch.ones(4, 4, device="cuda")
    measure(lambda: rows.index_select(0, torch.tensor([1 << 20], device="cuda")), timing="host")

def test_last(measure):
    call("last")
    measure(lambda: work(16), timing="host")
"""


def test_an_illegal_address_on_a_gpu_is_survived(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    suite = Suite(tmp_path, ILLEGAL, CONFTEST.replace('sys.modules["torch"] = None', ""))
    status, output = suite.run("--device=cuda", "--max-samples=5", "--min-samples=3")
    assert status == 1, output
    assert suite.names("measured") == ["first", "last"]
    (failed,) = suite.document["failed"]
    assert failed["name"] == "test_poisons" and failed["reason"].startswith("poisoned the CUDA context: ")
    assert suite.calls == {"first": 1, "poisons": 1, "last": 1}
