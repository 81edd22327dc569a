"""Profiles instead of timings: `--profile torch` writes a trace of each selected cell, `--profile ncu` a report.

A case is built and proven as it is for measuring; what is then recorded are a few of its calls. torch's profiler works
in this process, and the caches are flushed where they are when the cell is timed. Nsight Compute has to start the
process that it looks into: this same pytest runs under it for each cell, with that cell alone, and its journal says
what became of the cell.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tinylm.bench import journal, launch, nsight, timing, trial
from tinylm.bench.case import Case
from tinylm.bench.machine import Machine
from tinylm.bench.record import KNOWN, measures
from tinylm.bench.results import BrokenFile

SUFFIXES = {"torch": ".trace.json.gz", "ncu": ".ncu-rep"}  # of what each tool writes
MOST_CELLS = 20
# A trace has so many calls, or as many as fit into this time.
CALLS, SECONDS = 5, 1.0
# A kernel is run again for each group of counters; ncu empties the caches before each run, as `cold` does before one. A
# decode loop has thousands of kernels, and they repeat.
NCU_OPTIONS = ("--set", "detailed", "--clock-control", "none", "--cache-control", "all", "--profile-from-start", "off")
MOST_KERNELS = 200
NAME_LENGTH = 120  # file systems end at 255 bytes

# What the process under Nsight Compute is told: its cell, and where its journal goes.
_CELL, _JOURNAL = "TINYLM_PROFILED_CELL", "TINYLM_PROFILED_JOURNAL"


class Profiling:
    """The profiles of this run; a pytest plugin that `plugin.py` registers."""

    def __init__(self, config: pytest.Config, tool: str) -> None:
        """tool: of SUFFIXES. Raises ValueError where the other options contradict it."""
        self.tool = tool
        self.cell = os.environ.pop(_CELL, None)  # in a process under Nsight Compute: the only one
        self.journal = Path(os.environ.pop(_JOURNAL)) if self.cell else None
        self.paths: dict[str, Path] = {}  # of the selected cells, by node id
        self._config = config
        self._written: list[Path] = []
        json_path = journal.json_path(config)
        self._beside = (json_path or Path("profile")).absolute().with_suffix("")
        if config.getoption("benchmark_disable", False) or config.getoption("dist", "no") != "no":
            raise ValueError(f"--profile {tool}: not with --benchmark-disable or -n: nothing is measured then")
        if self.cell is None and json_path is not None and launch.has_timings(json_path):
            raise ValueError(f"--profile {tool}: {json_path} has timings, and this run takes none: name another file")

    def refusal(self, machine: Machine) -> str | None:
        """Why nothing can be profiled on this machine, in one line."""
        if self.tool == "torch" and machine.facts["torch"] is None:
            return "--profile torch: torch is not installed"
        if self.tool == "ncu" and machine.device != "cuda":
            return "--profile ncu: Nsight Compute looks into GPUs, and this run is on the CPU: use --profile torch"
        if self.tool == "ncu":
            try:
                nsight.command()
            except nsight.Unavailable as error:
                return f"--profile ncu: {error}"
        return None

    @pytest.hookimpl(trylast=True)  # after -k, -m and --deselect
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        ours = list(filter(measures, items))
        for item in ours:
            self.paths[item.nodeid] = self._path(item.name)
        if self.cell is not None:
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid != self.cell])
            items[:] = [item for item in items if item.nodeid == self.cell]
        elif len(ours) > MOST_CELLS:
            raise pytest.UsageError(
                f"--profile {self.tool}: {len(ours)} cells are selected, expected at most {MOST_CELLS}: choose with -k"
            )

    def _path(self, name: str) -> Path:
        safe = re.sub(r"[^A-Za-z0-9_.+]+", "-", name.removeprefix("test_")).strip("-")[:NAME_LENGTH]
        taken = set(self.paths.values())
        names = (self._beside.name + f".{safe}{number}" + SUFFIXES[self.tool] for number in ("", *range(2, 1000)))
        return next(path for path in map(self._beside.with_name, names) if path not in taken)

    # --- one cell --------------------------------------------------------------------------------------------------

    def take(self, item: pytest.Item, machine: Machine, build: Callable[[], Case], work: trial.Work) -> NoReturn:
        """Prove the case and record a few calls of it; the test ends here, as skipped. Raises as measuring does."""
        with machine.wall.phase("inputs"):
            case = build()
        path = self.paths[item.nodeid]
        # The profiler changes what kernels take, and how long a stream can be held.
        prepared = _prepare(machine, case, work, witnessed=self.tool != "ncu")
        with machine.wall.phase("profile"), machine.stream():
            start = time.perf_counter()
            prepared.call()  # proving has called it before
            prepared.wait()
            seconds = time.perf_counter() - start
            if self.tool == "ncu":
                _count(prepared, machine)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                _trace(prepared, machine, item.name, seconds, path)
        self._skip(item, path)

    def _skip(self, item: pytest.Item, path: Path) -> NoReturn:
        item.stash[KNOWN] = {"profile": path.name}
        self._written.append(path)
        pytest.skip(f"profiled: {path.name}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> None:
        """A cell for Nsight Compute runs in another process: here it would only take the memory that it needs there."""
        if self.tool != "ncu" or self.cell is not None or not measures(pyfuncitem):
            return
        path = self.paths[pyfuncitem.nodeid]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        trouble, cell = self._relaunch(pyfuncitem.nodeid, path)
        if cell and not cell["extra_info"].get("profile"):
            pyfuncitem.stash[KNOWN] = cell["extra_info"]
            ended = pytest.fail if cell["outcome"] == "failed" else pytest.skip
            ended(cell["reason"])
        if path.exists():
            self._skip(pyfuncitem, path)
        if trouble:
            pyfuncitem.session.shouldstop = trouble  # it would be so for every cell
        pytest.fail(trouble or "ncu wrote no report: the work runs no kernel", pytrace=False)

    def _relaunch(self, cell: str, path: Path) -> tuple[str | None, journal.Cell | None]:
        """Run this pytest again, for one cell, under Nsight Compute: why that could not be, what the cell became."""
        trouble = found = None
        arguments = [*NCU_OPTIONS, "--launch-count", str(MOST_KERNELS), "--force-overwrite", "--export", str(path)]
        with tempfile.TemporaryDirectory() as folder:
            told = {_CELL: cell, _JOURNAL: str(Path(folder, "cell" + journal.SUFFIX))}
            try:
                nsight.run(arguments, again(self._config), (), told, self._config.invocation_params.dir)
            except nsight.Unavailable as error:
                trouble = str(error)
            with suppress(BrokenFile):
                found = journal.read(Path(told[_JOURNAL])).cells.get(cell)
        return trouble, found

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for path in self._written:
            shown = os.path.relpath(path, self._config.invocation_params.dir)
            terminalreporter.write_line(f"tinylm: profile: {shown}")


@dataclass(frozen=True)
class Prepared:
    """A proven case: what leaves the caches as its timing would find them, one call of the work, what waits for it."""

    ready: Callable[[], None]
    call: timing.Work
    wait: Callable[[], None]


def _prepare(machine: Machine, case: Case, work: trial.Work, witnessed: bool = True) -> Prepared:
    """witnessed: proven by the device's own clocks too, which are right as long as nothing else slows down the work."""
    mode, sync = trial.mode_of(machine, work)
    gpu = machine.gpu
    with machine.stream():
        run = trial.prove(machine, case, mode if witnessed else "host", sync)

    def ready() -> None:
        if gpu is not None and mode in ("cold", "graph"):
            gpu.flush()

    def wait() -> None:
        if sync is not None:
            sync()
        if gpu is not None:
            gpu.drain()

    return Prepared(ready, trial.bind(case.fn, run.args), wait)


def again(config: pytest.Config) -> list[str]:
    """The command line that runs this pytest again."""
    arguments = [str(argument) for argument in config.invocation_params.args]
    if sys.argv[1:] == arguments:
        return [sys.executable, *sys.orig_argv[1:]]
    return [sys.executable, "-m", "pytest", *arguments]  # a program called pytest.main


def _trace(prepared: Prepared, machine: Machine, name: str, seconds: float, path: Path) -> None:
    """seconds: about how long a call takes."""
    from torch.profiler import ProfilerActivity, profile, record_function, schedule

    calls = max(1, min(CALLS, int(SECONDS / max(seconds, 1e-9))))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if machine.gpu else [])
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=calls, repeat=1),  # the profiler's own start takes a while
        on_trace_ready=lambda recorded: recorded.export_chrome_trace(str(path)),
        record_shapes=True,
    ) as recording:
        for _ in range(1 + calls):
            prepared.ready()
            with record_function(name):
                prepared.call()
            prepared.wait()
            recording.step()


def _count(prepared: Prepared, machine: Machine) -> None:
    """One call, of which Nsight Compute counts the kernels."""
    with machine.gpu.torch.cuda.profiler.profile() if machine.gpu else nullcontext():
        prepared.call()
        prepared.wait()
