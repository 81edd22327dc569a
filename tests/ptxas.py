"""What ptxas says of every kernel of csrc/: registers, shared memory, spills; from the compile that the wheel has."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest

from tinylm.ops import build


class Use(NamedTuple):
    """Of one kernel: registers a thread; bytes of static shared memory a block, of stack and spills a thread."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def parse(log: str) -> dict[str, dict[str, Use]]:
    """{"sm_75": {demangled kernel: Use}} of what `nvcc -Xptxas -v` printed. Of kernels of one name, the largest."""
    compiled = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
        r"Function properties for (?P=name)\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = list(compiled.finditer(log))
    readable = demangle([match["name"] for match in found])
    report: dict[str, dict[str, Use]] = {}
    for name, match in zip(readable, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        numbers = (match["registers"], shared[1] if shared else 0, match["stack"], match["stores"], match["loads"])
        use, kernels = Use(*map(int, numbers)), report.setdefault(match["arch"], {})
        kernels[name] = Use(*map(max, use, kernels.get(name, use)))
    assert len(found) == log.count("Compiling entry function"), "ptxas words its report in another way"
    return report


def demangle(names: list[str]) -> list[str]:
    """By c++filt, which binutils has; without it the names as they are."""
    if not names or not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@functools.cache
def report() -> dict[str, dict[str, Use]]:
    """Of all kernels for all targets of the wheel, warnings being errors; skips the test where nvcc is not."""
    if build.find_nvcc() is None:
        pytest.skip("no nvcc here: the kernels are not compiled")
    return parse(build.build_library(build.WHEEL_ARCHS, strict=True).log)
