"""The pytest plugin: options, cells, the `measure` fixture, the journal, and what enters pytest-benchmark's JSON.

Everything reaches pytest-benchmark through its public ways: a marker with a virtual clock as `timer`, `pedantic`,
`extra_info`, and its hooks. Its table, JSON, save, compare and histogram then work unchanged.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tinylm.bench import isolated, plan, telemetry, timing
from tinylm.bench.measure import Clock, Machine, Measure

# The smallest memory of a card, in GiB, for which a rung is chosen when none is given: below the nominal 40, 16 and 6,
# of which the driver keeps a part.
RUNG_MEMORY_GIB = {"datacenter": 36, "desktop": 14, "laptop": 5, "quick": 0}

_MACHINE = pytest.StashKey[Machine]()
_CLOCK = pytest.StashKey[Clock]()
_TROUBLE = pytest.StashKey[list[str]]()
_OVERRIDES = pytest.StashKey[Mapping[str, Sequence[Any]]]()
_KNOWN = pytest.StashKey[dict[str, list[Any]]]()  # axis -> what the experiments of this run take
_CELLS = pytest.StashKey[list[dict[str, Any]]]()  # finished cells, in order
_JOURNAL = pytest.StashKey[Path]()
_MEASURE = pytest.StashKey[Measure]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tinylm", "measuring (tinylm)")
    group.addoption("--gpu-label", metavar="NAME", help="label of this run (default: from the device's name)")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure")
    group.addoption("--preset-size", choices=plan.RUNGS, help="how large (default: from the device's memory)")
    group.addoption("--min-samples", type=int, metavar="N", help="fewest samples of a cell")
    group.addoption("--max-samples", type=int, metavar="N", help="most samples of a cell")
    group.addoption("--cell-seconds", type=float, metavar="S", help="stop sampling a cell after this time")
    for axis in plan.AXES:
        group.addoption(plan.option(axis), metavar="A,B", dest=f"axis_{axis}", help=f"these values of {axis} instead")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cells(rungs, choices, seconds): the cells of an experiment (tinylm)")
    config.stash[_CLOCK] = Clock()
    config.stash[_TROUBLE] = []
    config.stash[_KNOWN] = {}
    config.stash[_CELLS] = []
    try:  # what can be refused without a look at the device is refused at once
        telemetry.label({"type": "cpu"}, config.getoption("gpu_label"))
        _limits(config, timing.CPU_LIMITS)
        config.stash[_OVERRIDES] = {
            axis: plan.parse_values(axis, text)
            for axis in plan.AXES
            if (text := config.getoption(f"axis_{axis}")) is not None
        }
        json_path = _json_path(config)
        if json_path is not None:
            config.stash[_JOURNAL] = _journal(json_path)
    except (telemetry.MachineError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None


def _limits(config: pytest.Config, default: timing.Limits) -> timing.Limits:
    low, high = config.getoption("min_samples"), config.getoption("max_samples")
    seconds = config.getoption("cell_seconds")
    least = low if low is not None else min(default.min_samples, high or default.min_samples)
    most = high if high is not None else max(default.max_samples, least)
    try:
        return timing.Limits(least, most, default.seconds if seconds is None else seconds)
    except ValueError as error:
        raise ValueError(f"--min-samples, --max-samples, --cell-seconds: {error}") from None


def _machine(config: pytest.Config) -> Machine:
    """The machine of this run, looked at when the first benchmark needs it. Raises MachineError."""
    if _MACHINE not in config.stash:
        device = telemetry.resolve_device(config.getoption("device"))
        facts = telemetry.device_facts(device)
        label = telemetry.label(facts, config.getoption("gpu_label"))
        limits = _limits(config, timing.GPU_LIMITS if device == "cuda" else timing.CPU_LIMITS)
        config.stash[_MACHINE] = Machine(device, facts, label, limits)
    return config.stash[_MACHINE]


# --- cells ---------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cells")
    if marker is None:
        return
    config, rungs = metafunc.config, marker.kwargs["rungs"]
    axes = list(next(grid for grids in rungs.values() for grid in grids))
    found: list[plan.Cell] = []
    try:
        machine = _machine(config)
        overrides = config.stash[_OVERRIDES]
        for axis in axes:
            config.stash[_KNOWN].setdefault(axis, []).extend(
                marker.kwargs["choices"].get(axis, overrides.get(axis, []))
            )
        found = plan.expand(
            rungs,
            preset_size(config),
            overrides,
            marker.kwargs["choices"],
            machine.computes_bf16,
            marker.kwargs["refuse"],
        )
    except (telemetry.MachineError, plan.PlanError) as error:  # raised here it would be a traceback
        config.stash[_TROUBLE].append(str(error))
    values = [tuple(cell[axis] for axis in axes) for cell in found]
    metafunc.parametrize(axes, values, ids=[plan.cell_id(cell) for cell in found])


def preset_size(config: pytest.Config) -> str:
    """The rung of this run: as given, else from the memory of the card; `quick` on a CPU."""
    machine = _machine(config)
    given = config.getoption("preset_size")
    if given or machine.device == "cpu":
        return given or "quick"
    gib = machine.facts["memory_bytes"] / 2**30
    return next(rung for rung, least in RUNG_MEMORY_GIB.items() if gib >= least)


def _measures(item: pytest.Item) -> bool:
    return "measure" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = list(filter(_measures, items))
    trouble = config.stash[_TROUBLE]
    if ours and not trouble:
        try:
            _machine(config)
        except telemetry.MachineError as error:
            trouble.append(str(error))
    for axis, values in config.stash[_OVERRIDES].items():
        known = config.stash[_KNOWN].get(axis)
        unknown = [value for value in values if known is not None and value not in known]
        if unknown:
            expected = ", ".join(dict.fromkeys(map(str, known or [])))
            trouble.append(f"{plan.option(axis)} {unknown[0]!r}: expected some of {expected}")
    if trouble:
        raise pytest.UsageError(trouble[0])
    for item in ours:
        present = item.get_closest_marker("benchmark")  # markers do not merge: the closest wins whole
        options = {"group": _group(item)} | dict(present.kwargs if present else {}) | {"timer": config.stash[_CLOCK]}
        item.add_marker(pytest.mark.benchmark(**options), append=False)
        # Where a suite turns warnings into errors, a library's deprecation must not keep a backend from being measured.
        item.add_marker(pytest.mark.filterwarnings("default"))


def _group(item: pytest.Item) -> str:
    """Cells that differ only in how the work is done stand in one table."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    rest = {axis: value for axis, value in params.items() if axis not in ("impl", "cache")}
    return " ".join([getattr(item, "originalname", item.name).removeprefix("test_"), plan.cell_id(rest)]).strip()


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    ours = list(filter(_measures, items))
    if config.stash[_TROUBLE] or not ours:
        return []
    machine = _machine(config)
    files: dict[str, list[float]] = defaultdict(list)
    for item in ours:
        marker = item.get_closest_marker("cells")
        seconds = marker.kwargs["seconds"].get(machine.device, 0.0) if marker else 0.0
        files[item.path.name].append(seconds)
    lines = [f"tinylm: label {machine.label}, {machine.facts['name']}, size {preset_size(config)}"]
    for name, seconds_each in files.items():
        total = sum(seconds_each)
        forecast = f", about {total / 60:.1f} min" if total else ""
        lines.append(f"tinylm: {name}: {len(seconds_each)} cells{forecast}")
    return lines


# --- one cell ------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """`cuda` or `cpu`: where this run measures."""
    return _machine(request.config).device


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Measure]:
    """Times what it is handed, once per test; see `tinylm.bench.measure.Measure`."""
    config = request.config
    fixture = Measure(benchmark, _machine(config), config.stash[_CLOCK], request)
    request.node.stash[_MEASURE] = fixture
    yield fixture
    fixture.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    except Exception as error:
        if not (_measures(item) and isolated.is_out_of_memory(error)):
            raise
        if _MEASURE in item.stash:
            item.stash[_MEASURE].extra_info["out_of_memory"] = True
        reason = f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    pytest.skip(reason)  # outside the handler, so that the frames which hold the memory are gone


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if _measures(item) and "torch" in sys.modules and item.config.stash[_MACHINE].device == "cuda":
        gc.collect()
        sys.modules["torch"].cuda.empty_cache()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if _measures(item) and (report.when == "call" or (report.when == "setup" and not report.passed)):
        _finished(item, report, call)
    return report


def _finished(item: pytest.Item, report: Any, call: pytest.CallInfo[None]) -> None:
    fixture = item.stash.get(_MEASURE, None)
    marker = item.get_closest_marker("benchmark")
    cell = {
        "fullname": item.nodeid,
        "name": item.name,
        "group": marker.kwargs.get("group") if marker else None,
        "params": dict(item.callspec.params) if hasattr(item, "callspec") else None,
        "outcome": {"passed": "measured"}.get(report.outcome, report.outcome),
        "extra_info": dict(fixture.extra_info) if fixture else {},
    }
    if report.passed:
        cell["data"] = fixture.seconds if fixture else []
    elif report.skipped:
        told = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        cell["reason"] = told.removeprefix("Skipped: ")
    else:
        assert call.excinfo is not None
        cell["reason"] = f"{call.excinfo.typename}: {call.excinfo.value}".splitlines()[0]
    item.config.stash[_CELLS].append(cell)
    journal = item.config.stash.get(_JOURNAL, None)
    if journal is not None:
        if len(item.config.stash[_CELLS]) == 1:
            journal.parent.mkdir(parents=True, exist_ok=True)
            journal.unlink(missing_ok=True)
            now = datetime.datetime.now(datetime.UTC).isoformat()
            _append(journal, {"journal": 1, "started": now, "argv": sys.argv[1:]})
        _append(journal, cell)


# --- the journal and the JSON --------------------------------------------------------------------------------------


def _json_path(config: pytest.Config) -> Path | None:
    given = config.getoption("benchmark_json", None)
    # Before pytest-benchmark 5.3 this is an open file.
    return given if given is None or isinstance(given, Path) else Path(given.name)


def _journal(json_path: Path) -> Path:
    """Where the journal of this file goes, once a cell is finished. Raises ValueError if the file cannot be written."""
    if json_path.is_dir():
        raise ValueError(f"--benchmark-json {json_path}: is a folder, expected a file")
    there = json_path if json_path.exists() else json_path.absolute().parent
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK) or not (there.is_dir() or there == json_path):
        raise ValueError(f"--benchmark-json {json_path}: {there} cannot be written: name another")
    return json_path.with_name(json_path.stem + ".journal.jsonl")


def _append(journal: Path, entry: dict[str, Any]) -> None:
    """One line, on disk when this returns, so that whatever ends the run leaves every finished cell."""
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Only what stays the same from run to run, so that compare does not warn of a difference that is none."""
    for live in ("hz_actual", "hz_actual_friendly"):
        machine_info.get("cpu", {}).pop(live, None)
    try:
        machine = _machine(config)
    except telemetry.MachineError:
        return  # if a benchmark of ours is collected, the run stops there
    machine_info["label"], machine_info["device"] = machine.label, machine.facts


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    for outcome in ("skipped", "failed"):
        cells = [cell for cell in config.stash[_CELLS] if cell["outcome"] == outcome]
        output_json[outcome] = [{k: v for k, v in cell.items() if k != "outcome"} for cell in cells]
    if _MACHINE in config.stash:  # why a reading of extra_info is null
        output_json["null_reasons"] = config.stash[_MACHINE].null_reasons
