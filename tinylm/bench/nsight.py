"""Nsight Compute as the reference: durations of kernels, with our flush before each, and the clocks as they are."""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

METRIC = "gpu__time_duration.sum"
# The profiler counts, it does not interfere: no clocks locked, no caches flushed but by us, one pass.
OPTIONS = ("--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off")
REPEATS, WARM_REPEATS = 50, 10
# Kernels of our own, by which the list of kernels is taken apart again.
FLUSH, MARK = "read_all", "clock_marks"


class Unavailable(RuntimeError):
    """Nsight Compute is not here or may not read counters; the message says what to do."""


@dataclass(frozen=True)
class Duration:
    """Of one call: the median over repeats of the sum over its kernels, and the spread of those sums, in seconds."""

    seconds: float
    spread: float
    kernels: int


def command() -> str:
    """Nsight Compute's program. Raises Unavailable."""
    found = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin:/opt/nvidia/nsight-compute")
    if found is None:
        raise Unavailable("ncu is not on the PATH: install NVIDIA Nsight Compute, or add its folder to PATH")
    return found


def version() -> str | None:
    """Of Nsight Compute, as it says itself."""
    said = subprocess.run([command(), "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.removeprefix("Version ") for line in said.splitlines() if line.startswith("Version")), None)


def run(
    arguments: Sequence[str],
    program: Sequence[str],
    options: Sequence[str] = OPTIONS,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """Run a program under Nsight Compute; what was printed. Raises Unavailable where it may not read counters.

    environment: beside this process's. folder: to run in.
    """
    line = [command(), *options, *arguments, *program]
    variables = os.environ | (environment or {})
    done = subprocess.run(line, capture_output=True, text=True, env=variables, cwd=folder, check=False)
    said = done.stdout + done.stderr
    if "ERR_NVGPUCTRPERM" in said:
        raise Unavailable(
            "ncu may not read the GPU's counters (ERR_NVGPUCTRPERM): run as root, or load the driver with "
            "NVreg_RestrictProfilingToAdminUsers=0"
        )
    if done.returncode != 0:
        told = [line for line in said.splitlines() if "==ERROR==" in line or "Error" in line]
        raise Unavailable(f"ncu ended with status {done.returncode}: {told[0] if told else said[-200:].strip()}")
    return said


def durations(names: list[str]) -> dict[str, tuple[Duration, Duration]]:
    """For each kernel of `kernels.KERNELS` by name: after a flush, and with warm caches."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        program = [sys.executable, "-m", "tinylm.bench.nsight", *names]
        run(["--metrics", METRIC, "--csv", "--page", "raw", "--log-file", str(log)], program)
        rows = list(csv.reader(line for line in log.read_text().splitlines() if line.startswith('"')))
    return take_apart(names, rows)


def take_apart(names: list[str], rows: list[list[str]]) -> dict[str, tuple[Duration, Duration]]:
    """rows: of ncu's raw page, header and units first: for each name, calls after a flush each, then after a mark."""
    header, units = rows[0], rows[1]
    name, value = header.index("Kernel Name"), header.index(METRIC)
    scale = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3}[units[value]]
    calls: list[list[float]] = []
    for row in rows[2:]:
        if FLUSH in row[name] or MARK in row[name]:
            calls.append([])
        else:
            calls[-1].append(float(row[value].replace(",", "")) * scale)
    calls = [call for call in calls if call]
    series = REPEATS + WARM_REPEATS
    if len(calls) != series * len(names):
        raise Unavailable(f"ncu listed {len(calls)} calls where {series * len(names)} were made")
    found = {}
    for i, kernel in enumerate(names):
        own = calls[i * series : (i + 1) * series]
        found[kernel] = (_duration(own[:REPEATS]), _duration(own[REPEATS:]))
    return found


def _duration(calls: list[list[float]]) -> Duration:
    sums = sorted(map(sum, calls))
    return Duration(statistics.median(sums), sums[-2] - sums[1], len(calls[0]))


def main(names: list[str]) -> None:
    """What runs under the profiler: each kernel's calls, flushed and not, no blocking kernel anywhere."""
    from tinylm.bench import calibrate

    on = calibrate.machine("cuda", None)
    gpu = on.gpu
    assert gpu is not None
    for _, work in calibrate.works(names, on):
        for _ in range(3):
            work()
        gpu.flush()
        gpu.torch.cuda.synchronize()
        gpu.torch.cuda.profiler.start()
        for _ in range(REPEATS):
            gpu.flush()
            work()
        for _ in range(WARM_REPEATS):
            gpu.mark_clocks(end=False)
            work()
        gpu.torch.cuda.synchronize()
        gpu.torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
