"""A fresh process for one callable: its value, its error, or how it died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tinylm.bench import isolated


def add(a: int, b: int) -> tuple[int, int]:
    return a + b, os.getpid()


def fail() -> None:
    raise ValueError("first line\nsecond line")


def no_memory() -> None:
    raise MemoryError("64 GiB")


def leave() -> None:
    os._exit(3)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(600)


def test_the_value_comes_from_another_process_each_time() -> None:
    first, second = (isolated.run(add, a=2, b=3) for _ in range(2))
    assert first.status == second.status == "ok"
    assert first.value[0] == 5
    assert len({first.value[1], second.value[1], os.getpid()}) == 3


def test_an_error_is_one_line() -> None:
    outcome = isolated.run(fail)
    assert (outcome.status, outcome.reason) == ("failed", "ValueError: first line")


def test_out_of_memory_is_an_outcome_of_its_own() -> None:
    assert isolated.run(no_memory).status == "out-of-memory"


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


def test_out_of_memory_is_told_by_its_kind() -> None:
    assert isolated.is_out_of_memory(MemoryError())
    assert isolated.is_out_of_memory(OutOfMemoryError("CUDA out of memory"))
    assert isolated.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"))
    assert not isolated.is_out_of_memory(RuntimeError("boom"))


def test_a_process_that_dies_says_how() -> None:
    assert isolated.run(leave) == isolated.Outcome("crashed", reason="the process ended with exit code 3 and no result")
    killed = isolated.run(die)
    assert killed.status == "crashed" and "SIGKILL" in killed.reason


@pytest.mark.parametrize("limit", [0.5])
def test_a_process_that_hangs_is_ended(limit: float) -> None:
    outcome = isolated.run(hang, timeout=limit)
    assert (outcome.status, outcome.reason) == ("timeout", "no result within 0.5 s")


def wait_in(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


def test_a_process_ends_when_the_run_is_killed(tmp_path: Path) -> None:
    code = f"from test_isolated import *; isolated.run(wait_in, folder={str(tmp_path)!r})"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "torch.py").touch()  # the server imports it first, and that takes seconds
    path = os.pathsep.join(map(str, (tmp_path / "lib", Path(__file__).parent, Path(__file__).parents[2])))
    run = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    until = time.monotonic() + 60
    while not (found := list(tmp_path.glob("[0-9]*"))) and time.monotonic() < until:
        time.sleep(0.02)
    run.kill()
    run.wait()
    while alive(int(found[0].name)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(int(found[0].name))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # an orphan that nobody reaps has ended
    except psutil.NoSuchProcess:
        return False
