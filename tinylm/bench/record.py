"""What becomes of each cell: its lines in the journal, its record in the JSON, and whether it is measured at all.

What a resumed file has is not measured again. What is larger than a cell that ran out of memory is not tried. A cell
that loses the CUDA context ends the process, because every later cell would fail falsely.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tinylm.bench import journal, launch, plan, telemetry
from tinylm.bench.journal import Cell, History

if TYPE_CHECKING:  # this is part of every pytest session, also where nothing is measured
    from tinylm.bench.machine import Machine
    from tinylm.bench.measure import Measure

# Memory that torch keeps after a cell is given back from this share of the card's on.
CACHED_SHARE = 0.5

MEASURE: pytest.StashKey[Measure] = pytest.StashKey()
KNOWN = pytest.StashKey[dict[str, Any]]()  # extra_info that the benchmark does not give itself
_FACTS = ("machine_info", "commit_info")  # of pytest-benchmark's JSON


def measures(item: pytest.Item) -> bool:
    return "measure" in getattr(item, "fixturenames", ())


def context_is_lost() -> bool:
    """Whether every CUDA call of this process fails from now on, as after an illegal address."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


class Record:
    """The cells of this process; a pytest plugin that `plugin.py` registers."""

    def __init__(
        self,
        config: pytest.Config,
        machine: Callable[[], Machine],
        path: Path | None = None,
        resumed: History | None = None,
        retry: bool = False,
        token: str | None = None,
    ) -> None:
        """path: of the journal, if any. retry: of what was resumed, only the measured cells are finished. token: by
        which a supervisor knows this process.
        """
        self.resumed = resumed
        self.finished: dict[str, Cell] = {}  # before this process, by node id
        for name, cell in resumed.cells.items() if resumed else ():
            if cell.get("data") if cell["outcome"] == "measured" else not retry:
                self.finished[name] = cell
        self.poisoned = False  # the CUDA context is lost
        self._exhausted = [cell for cell in self.finished.values() if cell["extra_info"].get("out_of_memory") is True]
        self._config = config
        self._machine = machine
        self._path = path
        self._retry = retry
        self._token = token
        self._begun = False
        self._frozen = False
        self._cells: dict[str, Cell] = {}  # what this process reported, measured by it or before
        self._starts: dict[str, tuple[str, float]] = {}  # node id -> when, and by the clock that wall_s is taken with
        self._latest: dict[str, Any] = {}  # the journal's last start
        self._facts: dict[str, Any] = {}  # as they were when the first cell started

    def mismatch(self) -> list[str]:
        """Why this machine's figures cannot stand beside those of the resumed file, in one line."""
        machine = self._machine()
        if self.resumed is None:
            return []
        before = self.resumed.header.get("machine_info") or {}
        label, name = before.get("label"), (before.get("device") or {}).get("name")
        if (label, name) == (machine.label, machine.facts["name"]):
            return []
        here = f"{machine.label} ({machine.facts['name']})"
        return [f"--resume {self.resumed.path}: measured on {label} ({name}), this is {here}: start a run of its own"]

    def lines(self, items: Sequence[pytest.Item]) -> list[str]:
        """What the user is told at the start."""
        if self.resumed is None:
            there = journal.unended(self._path) if self._path else None
            return [f"{there}: the journal of a run that did not end, kept for --resume"] if there else []
        taken = sum(item.nodeid in self.finished for item in items)
        line = f"{self.resumed.path}: {len(self.finished)} finished cells, {taken} of the {len(items)} of this run"
        now = self._config.hook.pytest_benchmark_generate_commit_info(config=self._config) or {}
        before = self.resumed.header.get("commit_info") or {}
        ids = [str(commit.get("id")) for commit in (before, now)]
        return [line] + ([f"that was at commit {ids[0]:.9}, this is {ids[1]:.9}"] if ids[0] != ids[1] else [])

    # --- whether a cell is measured --------------------------------------------------------------------------------

    def settled(self, item: pytest.Item) -> str | None:
        """Why this process is not to measure a cell; None where it is."""
        if item.nodeid in self.finished:
            return self.finished[item.nodeid].get("reason") or "measured before"
        smaller = self._smaller(item)
        return smaller and f"larger than one that ran out of memory: {smaller}"

    def _smaller(self, item: pytest.Item) -> str | None:
        """The cell of the same test that ran out of memory, of which this is a larger one."""
        test, params = item.nodeid.partition("[")[0], _params(item) or {}
        for cell in self._exhausted:
            if cell["fullname"].partition("[")[0] == test and plan.larger(params, cell["params"] or {}):
                return cell["name"]
        return None

    def start(self, item: pytest.Item) -> None:
        """Write down that a cell is about to be measured, so that it is known if it ends the process."""
        at = journal.now()
        self._starts.setdefault(item.nodeid, (at, time.perf_counter()))
        if self._latest.get("start") != item.nodeid:
            self._latest = {"start": item.nodeid, **_names(item), "at": at}
            self._append(self._latest, durable=False)  # of use after this process, not after the system

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        if measures(item):
            self._begin()
            if not self.settled(item):
                self._starts.pop(item.nodeid, None)  # it may have been measured with a peer: what is left is its own
                self.start(item)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        before = self.finished.get(item.nodeid)
        if before is not None and before["outcome"] == "failed":
            pytest.fail(f"in an earlier process: {before.get('reason')}", pytrace=False)
        if measures(item) and (before is None or before["outcome"] == "skipped") and (reason := self.settled(item)):
            item.stash[KNOWN] = {"larger_than": self._smaller(item)}
            pytest.skip(reason)
        return (yield from self._out_of_memory(item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._out_of_memory(item))

    def _out_of_memory(self, item: pytest.Item) -> Generator[None, object, object]:
        try:
            return (yield)
        except Exception as error:
            from tinylm.bench import isolated

            if not (measures(item) and isolated.is_out_of_memory(error)):
                raise
            item.stash[KNOWN] = {"out_of_memory": True}
            reason = f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        pytest.skip(reason)  # outside the handler, so that the frames which hold the memory are gone

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """What was measured before is replayed, and the test's own code does not run."""
        before = self.finished.get(pyfuncitem.nodeid)
        if before is None or not measures(pyfuncitem):
            return None
        fixture = pyfuncitem.stash[MEASURE]
        fixture.extra_info.update(before["extra_info"])
        fixture._replay(before["data"], lambda: None)
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if measures(item) and not self.poisoned and "torch" in sys.modules and self._machine().device == "cuda":
            with self._machine().wall.phase("cleaning"):
                self._clean(sys.modules["torch"].cuda)

    def _clean(self, cuda: Any) -> None:
        """Let go of the cell's memory; give it back to the card where it is much: that takes time, here and later."""
        if not self._frozen:
            gc.freeze()  # what was imported is no garbage: looking through it each time takes 0.1 s
            self._frozen = True
        gc.collect(1)  # the cell's own garbage is young
        if cuda.memory_reserved() > self._machine().facts["memory_bytes"] * CACHED_SHARE:
            gc.collect()
            cuda.empty_cache()

    # --- what became of it -----------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if not measures(item):
            return report
        if report.failed and not self.poisoned and context_is_lost():
            self.poisoned = True
            rest = f"; --resume {self._path} measures the rest in a fresh process" if self._path else ""
            item.session.shouldstop = f"{item.name} poisoned the CUDA context{rest}"
        if report.when == "call" or (report.when == "setup" and not report.passed):
            before = self.finished.get(item.nodeid)
            if before is None:
                self._finish(item, report, call)
            elif report.passed == (before["outcome"] == "measured"):  # else a fixture failed, and what is known stays
                self._cells[item.nodeid] = before
        return report

    def _finish(self, item: pytest.Item, report: pytest.TestReport, call: pytest.CallInfo[None]) -> None:
        fixture = item.stash.get(MEASURE, None)
        extra = (dict(fixture.extra_info) if fixture else {}) | item.stash.get(KNOWN, {})
        outcome = {"passed": "measured"}.get(report.outcome, report.outcome)
        cell = {"fullname": item.nodeid, **_names(item), "outcome": outcome, "extra_info": extra}
        if report.passed:
            cell["data"] = fixture.seconds if fixture else []
        elif report.skipped:
            told = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
            cell["reason"] = told.removeprefix("Skipped: ")
        else:
            assert call.excinfo is not None
            cell["reason"] = f"{call.excinfo.typename}: {call.excinfo.value}".splitlines()[0]
        if self.poisoned and report.failed:
            # The last to start was another where this one's peers are measured with it.
            poisoning = self._latest.get("start", item.nodeid)
            cell |= {"fullname": poisoning, **{key: self._latest.get(key) for key in ("name", "group", "params")}}
            cell |= journal.lost(self._latest, f"poisoned the CUDA context: {cell['reason']}", crashed=True)
        reasons = self._machine().null_reasons
        cell["null_reasons"] = {key: reasons[key] for key in extra if extra[key] is None and key in reasons}
        if item.nodeid in self._starts:
            at, clock = self._starts[item.nodeid]
            cell |= {"at": at, "wall_s": time.perf_counter() - clock}
        if extra.get("out_of_memory") is True:
            self._exhausted.append(cell)
        self._cells[cell["fullname"]] = cell
        self._append(cell)

    # --- the journal and the JSON ----------------------------------------------------------------------------------

    def _append(self, entry: Mapping[str, Any], durable: bool = True) -> None:
        if self._path is not None:
            with self._machine().wall.phase("reporting"):
                journal.append(self._path, entry, durable=durable)

    def _begin(self) -> None:
        """The journal's header, when the first cell comes: a run that is refused before leaves nothing."""
        if self._path is None or self._begun:
            return
        self._begun = True
        header: dict[str, Any] = {
            "journal": 1,
            "pid": os.getpid(),
            "token": self._token,
            "started": journal.now(),
            "argv": list(self._config.invocation_params.args),
            "label": self._machine().label,
            "pytest_benchmark": importlib.metadata.version("pytest-benchmark"),
            "retry": self._retry,
        }
        hook = self._config.hook
        for name in _FACTS:
            header[name] = getattr(hook, f"pytest_benchmark_generate_{name}")(config=self._config)
            self._facts[name] = copy.deepcopy(header[name])
            getattr(hook, f"pytest_benchmark_update_{name}")(config=self._config, **{name: header[name]})
        if self.resumed and self.resumed.path.resolve() == self._path.resolve():
            journal.append(self._path, header)
        else:
            if kept := journal.unended(self._path):
                os.replace(self._path, kept)
            journal.create(self._path, header, *self.finished.values())

    # pytest-benchmark asks for these when the run ends. They are to be those of its start, and looked up once.
    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_benchmark_generate_machine_info(self) -> Any:
        return copy.deepcopy(self._facts.get("machine_info"))

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_benchmark_generate_commit_info(self) -> Any:
        return copy.deepcopy(self._facts.get("commit_info"))

    @pytest.hookimpl(optionalhook=True)
    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """Adds skipped and failed cells, and those of the resumed file that this process did not come to."""
        if not (self._cells or self.finished):
            return  # a suite that has no cells of ours
        rest = [cell for name, cell in self.finished.items() if name not in self._cells]
        output_json["benchmarks"] += [journal.benchmark(cell) for cell in rest if cell["outcome"] == "measured"]
        for outcome in ("skipped", "failed"):
            output_json[outcome] = journal.listed([*self._cells.values(), *rest], outcome)
        if self._cells:  # why a reading of extra_info is null
            before = self.resumed.null_reasons if self.resumed else {}
            output_json["null_reasons"] = before | self._machine().null_reasons
            # Of this process: of a run that was resumed, the last part.
            output_json["wall_s"] = self._machine().wall.account(telemetry.running_s())

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self._path is None or not self._begun:
            return
        # pytest-benchmark has written its file by now: it does so around this hook.
        self._append({"end": journal.now(), "status": int(exitstatus), "poisoned": self.poisoned})
        document = journal.json_path(self._config)
        measured = any(cell["outcome"] == "measured" for cell in (self.finished | self._cells).values())
        if measured or exitstatus not in (0, 1) or document is None or launch.has_timings(document):
            return
        if journal.beside(document.absolute()) == self._path:  # else it is of another run, which started this one
            launch.write(journal.read(self._path), document)  # pytest-benchmark writes none where nothing was measured


def _params(item: pytest.Item) -> dict[str, Any] | None:
    return dict(item.callspec.params) if hasattr(item, "callspec") else None


def _names(item: pytest.Item) -> dict[str, Any]:
    marker = item.get_closest_marker("benchmark")
    group = marker.kwargs.get("group") if marker else None
    param = item.callspec.id if hasattr(item, "callspec") else None
    return {"name": item.name, "group": group, "params": _params(item), "param": param}
