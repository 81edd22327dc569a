"""The pytest plugin: options, cells, the `measure` fixture, and what enters pytest-benchmark's machine_info.

Everything reaches pytest-benchmark through its public ways: a marker with a virtual clock as `timer`, `pedantic`,
`extra_info`, and its hooks. Its table, JSON, save, compare and histogram then work unchanged.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tinylm.bench import journal, options, plan, supervisor, telemetry, timing
from tinylm.bench.record import MEASURE, Record, measures
from tinylm.bench.results import BrokenFile
from tinylm.bench.wall import Wall, overhead

if TYPE_CHECKING:  # this is part of every pytest session, also where nothing is measured
    from tinylm.bench.machine import Machine
    from tinylm.bench.measure import Clock, Measure

# The smallest memory of a card, in GiB, for which a rung is chosen when none is given: below the nominal 40, 16 and 6,
# of which the driver keeps a part.
RUNG_MEMORY_GIB = {"datacenter": 36, "desktop": 14, "laptop": 5, "quick": 0}

_MACHINE: pytest.StashKey[Machine] = pytest.StashKey()
_CLOCK: pytest.StashKey[Clock] = pytest.StashKey()
_WALL = pytest.StashKey[Wall]()
_TROUBLE = pytest.StashKey[list[str]]()
_OVERRIDES = pytest.StashKey[Mapping[str, Sequence[Any]]]()
_KNOWN = pytest.StashKey[dict[str, list[Any]]]()  # axis -> what the experiments of this run take
_OURS = pytest.StashKey[bool]()  # cells of this plugin were collected
_SUPERVISED = pytest.StashKey[tuple[str | None, Path | None]]()  # its supervisor's token, the journal to resume


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    options.add(parser, options.OWN)
    files = [Path(getattr(plugin, "__file__", None) or "").name for plugin in pluginmanager.get_plugins()]
    if "conftest.py" in files:  # one of them names this plugin, so that the hook below is over
        options.add(parser, options.COMMON)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None, object, object]:
    result = yield
    options.add(parser, options.COMMON)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """A run that writes a file is supervised, so that it outlives a cell that crashes."""
    config.stash[_SUPERVISED] = supervisor.adopt()
    json_path = journal.json_path(config)
    if config.stash[_SUPERVISED][0] is not None or json_path is None or not supervisor.wanted(config):
        return None
    return supervisor.supervise([sys.executable, *sys.orig_argv[1:]], journal.beside(json_path.absolute()))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cells(rungs, choices, seconds): the cells of an experiment (tinylm)")
    config.stash[_WALL] = Wall()
    config.stash[_TROUBLE] = []
    config.stash[_KNOWN] = {}
    config.stash[_OURS] = False
    try:  # what can be refused without a look at the device is refused at once
        telemetry.label({"type": "cpu"}, options.given(config, "--gpu-label"))
        _limits(config, timing.CPU_LIMITS)
        config.stash[_OVERRIDES] = {
            axis: plan.parse_values(axis, text)
            for axis in plan.AXES
            if (text := options.given(config, plan.option(axis))) is not None
        }
        if (profiling := _profiling(config)) is not None:
            config.stash[journal.PROFILING] = profiling
            config.pluginmanager.register(profiling, "tinylm-profiling")
        config.stash[journal.RECORD] = _record(config)
    except (telemetry.MachineError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    config.pluginmanager.register(config.stash[journal.RECORD], "tinylm-record")


def _limits(config: pytest.Config, default: timing.Limits) -> timing.Limits:
    values = {field: options.given(config, name) for name, field in options.LIMITS.items()}
    given = {field: value for field, value in values.items() if value is not None}
    low, high = given.get("min_samples"), given.get("max_samples")
    given.setdefault("min_samples", min(default.min_samples, high or default.min_samples))
    given.setdefault("max_samples", max(default.max_samples, low or default.max_samples))
    try:
        return dataclasses.replace(default, **given)
    except ValueError as error:
        raise ValueError(f"{', '.join(options.LIMITS)}: {error}") from None


def _profiling(config: pytest.Config) -> Any:
    """What takes profiles instead of timings, where it is asked for. Raises ValueError."""
    tool = options.given(config, "--profile")
    if tool is None:
        return None
    if options.given(config, "--resume") is not None:
        raise ValueError(f"--profile {tool}: not with --resume: what is there was timed")
    from tinylm.bench.profiling import Profiling

    return Profiling(config, tool)


def _record(config: pytest.Config) -> Record:
    """What keeps the cells. Raises ValueError if the JSON cannot be written, or the file to resume not be read."""
    path = journal.json_path(config)
    if path is not None:
        journal.check_writable(path)
    given, retry = options.given(config, "--resume"), options.given(config, "--retry")
    if retry and given is None:
        raise ValueError("--retry: expected --resume FILE with it, whose cells are to be measured once more")
    token, again = config.stash.get(_SUPERVISED, (None, None))
    if again is not None:  # this process goes on where another was lost
        given, retry = again, False
    try:
        resumed = None if given is None else journal.load(given)
    except BrokenFile as error:
        raise ValueError(f"--resume {error}") from None
    if config.getoption("benchmark_disable", False) or config.getoption("dist", "no") != "no":
        path = None  # nothing is measured
    path = path and journal.beside(path.absolute())
    if (profiling := config.stash.get(journal.PROFILING, None)) and profiling.journal is not None:
        path = profiling.journal  # this process was started for one cell
    return Record(config, lambda: _machine(config), path, resumed, retry, token)


def _machine(config: pytest.Config) -> Machine:
    """The machine of this run, looked at when the first benchmark needs it. Raises MachineError."""
    if _MACHINE not in config.stash:
        from tinylm.bench.machine import Machine

        device = telemetry.resolve_device(options.given(config, "--device"))
        facts = telemetry.device_facts(device)
        label = telemetry.label(facts, options.given(config, "--gpu-label"))
        limits = _limits(config, timing.GPU_LIMITS if device == "cuda" else timing.CPU_LIMITS)
        energy, wall = options.given(config, "--energy"), config.stash[_WALL]
        config.stash[_MACHINE] = Machine(device, facts, label, limits, energy, wall)
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
    given = options.given(config, "--preset-size")
    if given or machine.device == "cpu":
        return given or "quick"
    gib = machine.facts["memory_bytes"] / 2**30
    return next(rung for rung, least in RUNG_MEMORY_GIB.items() if gib >= least)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = list(filter(measures, items))
    trouble = config.stash[_TROUBLE]
    if ours and not trouble:
        config.stash[_OURS] = True
        try:
            trouble += config.stash[journal.RECORD].mismatch()
        except telemetry.MachineError as error:
            trouble.append(str(error))
    for axis, values in config.stash[_OVERRIDES].items():
        known = config.stash[_KNOWN].get(axis)
        unknown = [value for value in values if known is not None and value not in known]
        if unknown:
            expected = ", ".join(dict.fromkeys(map(str, known or [])))
            trouble.append(f"{plan.option(axis)} {unknown[0]!r}: expected some of {expected}")
    profiling = config.stash.get(journal.PROFILING, None)
    if ours and not trouble and profiling is not None:
        trouble += filter(None, [profiling.refusal(_machine(config))])
    if trouble:
        raise pytest.UsageError(trouble[0])
    if ours:
        from tinylm.bench.measure import Clock

        config.stash[_CLOCK] = Clock()
    for item in ours:
        present = item.get_closest_marker("benchmark")  # markers do not merge: the closest wins whole
        marked = {"group": _group(item)} | dict(present.kwargs if present else {}) | {"timer": config.stash[_CLOCK]}
        item.add_marker(pytest.mark.benchmark(**marked), append=False)
        # Where a suite turns warnings into errors, a library's deprecation must not keep a backend from being measured.
        item.add_marker(pytest.mark.filterwarnings("default"))


def _group(item: pytest.Item) -> str:
    """Cells that differ only in how the work is done stand in one table."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    rest = {axis: value for axis, value in params.items() if axis not in ("impl", "cache")}
    return " ".join([getattr(item, "originalname", item.name).removeprefix("test_"), plan.cell_id(rest)]).strip()


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    ours = list(filter(measures, items))
    if config.stash[_TROUBLE] or not ours:
        return []
    # From the start of the process: the interpreter, torch, the benchmarks.
    config.stash[_WALL].seconds["import"] = telemetry.running_s()
    machine, record = _machine(config), config.stash[journal.RECORD]
    files: dict[str, list[float]] = defaultdict(list)
    for item in ours:
        marker = item.get_closest_marker("cells")
        seconds = marker.kwargs["seconds"].get(machine.device, 0.0) if marker else 0.0
        files[item.path.name].append(0.0 if record.settled(item) else seconds)
    usual = not (config.stash[_OVERRIDES] or journal.PROFILING in config.stash) and all(
        options.given(config, name) is None for name in options.LIMITS
    )
    lines = [f"tinylm: label {machine.label}, {machine.facts['name']}, size {preset_size(config)}"]
    for name, seconds_each in files.items():
        total = sum(seconds_each)
        forecast = f", about {total / 60:.1f} min" if total and usual else ""
        lines.append(f"tinylm: {name}: {len(seconds_each)} cells{forecast}")
    return lines + [f"tinylm: {line}" for line in record.lines(ours)]


# --- one cell ------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """`cuda` or `cpu`: where this run measures."""
    return _machine(request.config).device


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Measure]:
    """Times what it is handed, once per test; see `tinylm.bench.measure.Measure`."""
    from tinylm.bench.measure import Measure

    config = request.config
    fixture = Measure(benchmark, _machine(config), config.stash[_CLOCK], request)
    request.node.stash[MEASURE] = fixture
    yield fixture
    fixture.close()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Only what stays the same from run to run, so that compare does not warn of a difference that is none."""
    # A suite that uses nothing of ours is not to import torch for it.
    if config.stash[_OURS] or options.given(config, "--gpu-label"):
        _add_machine(config, machine_info)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> Generator[None, object, object]:
    """pytest-benchmark compares before it is known what the run collects: the file tells whether it is of ours."""
    if "label" in compared_benchmark["machine_info"]:
        _add_machine(config, machine_info)
    return (yield)


def _add_machine(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    try:
        machine = _machine(config)
    except telemetry.MachineError:
        return  # if a benchmark of ours is collected, the run stops there
    for live in ("hz_actual", "hz_actual_friendly"):
        machine_info.get("cpu", {}).pop(live, None)
    machine_info["label"], machine_info["device"] = machine.label, machine.facts


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Where the time went, in one line."""
    if not config.stash[_OURS] or journal.PROFILING in config.stash:
        return
    spent = config.stash[_WALL].account(telemetry.running_s())
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items() if seconds >= 0.05)
    besides = overhead(spent)
    rest = "" if besides is None else f"; besides work and flush {besides:.1%} of the time after preparation"
    terminalreporter.write_line(f"tinylm: seconds: {told}{rest}")
