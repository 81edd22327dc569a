"""The plugin through pytest itself: what reaches pytest-benchmark, what is refused, what is kept."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy.fft  # noqa: F401
import pytest
import scipy.special  # noqa: F401

import tinylm.bench.measure
import tinylm.bench.plugin  # noqa: F401

# pytester forgets what a run imported, and torch cannot be imported a second time: it, what it and the statistics use,
# and what the plugin imports late, must be there before.
try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

pytest_plugins = ["pytester"]

# Where tinylm is installed, its entry point loads the plugin; in a bare checkout it is named.
INSTALLED = any(entry.name == "tinylm.bench.plugin" for entry in importlib.metadata.entry_points(group="pytest11"))
LOADED = [] if INSTALLED else ["-p", "tinylm.bench.plugin"]

SAMPLES = [0.25, 0.5, 0.125, 1.0]

SUITE = f"""
import os, time
import pytest
from tinylm.bench import cells

SCALE = float(os.environ.get("SCALE", "1"))

@cells(quick=[dict(hidden=[64, 128], impl=["eager", "torch"])], laptop=[dict(hidden=[256], impl=["eager"])],
       choices=dict(impl=["eager", "torch"]), seconds=dict(cpu=30.0))
def test_given(measure, hidden, impl):
    if impl == "torch" and hidden == 128:
        pytest.skip("torch cannot do 128")
    measure.samples([SCALE * s for s in {SAMPLES}], timing="host", bytes=None, tokens=2)
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("TINYLM_GPU_LABEL", raising=False)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )

    def run(source: str, *arguments: str, subprocess: bool = False) -> pytest.RunResult:
        pytester.makepyfile(bench_it=source)
        command = [*LOADED, "--device", "cpu", "bench_it.py", *arguments]
        return pytester.runpytest_subprocess(*command) if subprocess else pytester.runpytest_inprocess(*command)

    run.path = pytester.path  # type: ignore[attr-defined]
    return run


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_samples_reach_the_json_as_they_are(suite: Any) -> None:
    suite(SUITE, "--benchmark-json=out.json").assert_outcomes(passed=3, skipped=1)
    data = load(suite.path / "out.json")
    by_name = {b["name"]: b for b in data["benchmarks"]}
    assert set(by_name) == {"test_given[h64-eager]", "test_given[h64-torch]", "test_given[h128-eager]"}
    cell = by_name["test_given[h64-eager]"]
    assert cell["stats"]["data"] == SAMPLES and cell["stats"]["median"] == 0.375
    assert cell["params"] == {"hidden": 64, "impl": "eager"}
    assert cell["extra_info"] == {"timing": "host", "stop_reason": "given", "tokens": 2, "tokens_per_s": 2 / 0.375}
    assert cell["group"] == by_name["test_given[h64-torch]"]["group"] == "given h64"
    (skipped,) = data["skipped"]
    assert skipped["reason"] == "torch cannot do 128" and skipped["params"] == {"hidden": 128, "impl": "torch"}
    assert data["failed"] == []


def test_machine_info_holds_only_what_stays(suite: Any) -> None:
    for name in ("one", "two"):
        suite(SUITE, f"--benchmark-json={name}.json", "--gpu-label=my-card")
    one, two = (load(suite.path / f"{name}.json")["machine_info"] for name in ("one", "two"))
    assert one == two and one["label"] == "my-card" and one["device"]["type"] == "cpu"
    assert not any("actual" in key for key in one["cpu"])


def test_save_compare_and_compare_fail(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suite(SUITE, "--benchmark-autosave").assert_outcomes(passed=3, skipped=1)
    same = suite(SUITE, "--benchmark-compare", "--benchmark-compare-fail=median:1%")
    same.assert_outcomes(passed=3, skipped=1)
    assert same.ret == 0 and "machine_info is different" not in same.stdout.str() + same.stderr.str()
    same.stdout.fnmatch_lines(["*(0001_*", "*(NOW)*"])
    monkeypatch.setenv("SCALE", "1.5")
    slower = suite(SUITE, "--benchmark-compare", "--benchmark-compare-fail=median:1%")
    assert slower.ret != 0
    (slower.stdout.fnmatch_lines if "regressed" in slower.stdout.str() else slower.stderr.fnmatch_lines)(
        ["*Performance has regressed*"]
    )


def test_histogram(suite: Any) -> None:
    if importlib.util.find_spec("pygal") is None:
        pytest.skip("pytest-benchmark draws histograms with pygal, which is not installed")
    # In a process of its own: pygal's import changes sys.meta_path for good.
    suite(SUITE, "--benchmark-histogram=drawn", subprocess=True).assert_outcomes(passed=3, skipped=1)
    assert list(suite.path.glob("drawn*.svg"))


def test_command_line_compare_pairs_the_cells_of_two_labels(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("one", "two"):  # pytest-benchmark before 5.3 makes no folder
        (suite.path / "results" / label / "main").mkdir(parents=True)
    suite(SUITE, "--benchmark-json=results/one/main/1.json", "--gpu-label=one")
    monkeypatch.setenv("SCALE", "2")
    suite(SUITE, "--benchmark-json=results/two/main/1.json", "--gpu-label=two")
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "--group-by=fullname"]
    files = [f"results/{label}/main/1.json" for label in ("one", "two")]
    done = subprocess.run([*command, *files], cwd=suite.path, capture_output=True, text=True, check=True)
    assert done.stdout.count("2 tests") == 3


def test_selecting_and_disabling(suite: Any) -> None:
    suite(SUITE, "-k", "h64 and eager").assert_outcomes(passed=1, deselected=3)
    source = """
def test_it(measure):
    calls = []
    measure(lambda x: calls.append(x), inputs=lambda: (7,), check=lambda result, x: 0.0)
    assert calls == [7]
"""
    suite(source, "--benchmark-disable").assert_outcomes(passed=1)


def test_rungs_overrides_and_forecast(suite: Any) -> None:
    assert suite(SUITE, "--collect-only", "-q").stdout.str().count("::test_given") == 4
    assert suite(SUITE, "--collect-only", "-q", "--preset-size=datacenter").stdout.str().count("::test_given") == 5
    found = suite(SUITE, "--collect-only", "-q", "--hidden=8,16,32").stdout.str()
    assert found.count("::test_given") == 6 and "[h32-torch]" in found
    suite(SUITE).stdout.fnmatch_lines(["tinylm: label cpu,*size quick", "tinylm: bench_it.py: 4 cells, about 2.0 min"])
    # Measured for the cells as they are planned: of others it would be wrong.
    for changed in ("--hidden=64", "--max-samples=3"):
        suite(SUITE, changed).stdout.fnmatch_lines(["tinylm: bench_it.py: [24] cells"])


CHECKS = """
import math
import pytest

def test_wrong(measure):
    measure(lambda: 1, check=lambda result: math.nan)

def test_unequal(measure):
    def check(result):
        assert result == 2, "expected 2"
    measure(lambda: 1, check=check)

def test_early(measure):
    raise ValueError("before anything")

def test_memory(measure):
    measure.extra_info["predicted_bytes"] = 5
    raise MemoryError("64 GiB")

def test_right(measure):
    measure(lambda: 1, check=lambda result: 0.0)
"""


def test_a_wrong_result_is_a_failed_cell_and_never_a_number(suite: Any) -> None:
    result = suite(CHECKS, "--benchmark-json=out.json", "-W", "error::pytest_benchmark.logger.PytestBenchmarkWarning")
    result.assert_outcomes(passed=1, failed=3, skipped=1)
    data = load(suite.path / "out.json")
    assert [b["name"] for b in data["benchmarks"]] == ["test_right"]
    assert data["benchmarks"][0]["extra_info"]["error"] == 0.0
    reasons = {cell["name"]: cell["reason"] for cell in data["failed"]}
    assert set(reasons) == {"test_wrong", "test_unequal", "test_early"}
    assert "not finite" in reasons["test_wrong"] and "expected 2" in reasons["test_unequal"]
    (memory,) = data["skipped"]
    assert memory["reason"] == "out of memory: 64 GiB"
    assert memory["extra_info"] == {"predicted_bytes": 5, "out_of_memory": True}


def test_every_call_does_the_declared_work_and_is_recorded_per_unit(suite: Any) -> None:
    source = """
def test_it(measure):
    made = []
    measure(lambda: made.append(1), units=4, bytes=8, tokens=1, check=lambda result: None)
    info = measure.extra_info
    assert info["bytes"] == 8 and info["tokens"] == 1 and info["timing"] == "host"
    assert len(measure.seconds) <= len(made)
    median = sorted(measure.seconds)[len(measure.seconds) // 2]
    if info["ceiling_bytes_per_s"] is not None:  # torch is there
        assert 0 < info["of_ceiling"] == info["bytes_per_s"] / info["ceiling_bytes_per_s"]
"""
    suite(source, "--max-samples=3", "--min-samples=3").assert_outcomes(passed=1)


GROUP = """
import pytest
from tinylm.bench import cells
from tinylm.bench.measure import Case

BUILT = []

@cells(quick=[dict(phase=["decode", "train"], impl=["a", "b", "c"])])
def test_peers(measure, phase, impl):
    def build(value):
        BUILT.append((phase, value))
        if value == "c":
            pytest.skip("c cannot")
        return Case(lambda: value)
    measure.interleaved("impl", build)

def test_built():
    print("BUILT", BUILT)
"""


def test_peers_are_measured_together_and_replay_their_own_samples(suite: Any) -> None:
    result = suite(GROUP, "--benchmark-json=out.json", "-s")
    result.assert_outcomes(passed=5, skipped=2)
    # Each setting once, by the group's first test, for all of its peers.
    expected = [(phase, value) for phase in ("decode", "train") for value in "abc"]
    assert f"BUILT {expected}" in result.stdout.str()
    data = load(suite.path / "out.json")
    assert len(data["benchmarks"]) == 4
    rounds: dict[str, set[int]] = {b["name"].split("-")[0]: set() for b in data["benchmarks"]}
    for b in data["benchmarks"]:
        rounds[b["name"].split("-")[0]].add(b["stats"]["rounds"])
    assert all(len(counts) == 1 for counts in rounds.values())
    assert [cell["reason"] for cell in data["skipped"]] == ["c cannot"] * 2


def test_only_selected_peers_are_measured(suite: Any) -> None:
    result = suite(GROUP, "-s", "-k", "decode-a or built")
    assert "BUILT [('decode', 'a')]" in result.stdout.str()


def test_a_warning_is_no_failed_cell_where_the_suite_makes_warnings_errors(suite: Any) -> None:
    source = """
import warnings

def test_it(measure):
    measure(lambda: warnings.warn("old", DeprecationWarning))
"""
    suite(source, "-W", "error").assert_outcomes(passed=1)


def test_cprofile_profiles_the_work(suite: Any) -> None:
    source = """
def the_work():
    return sum(range(1000))

def test_it(measure):
    measure(the_work)
"""
    result = suite(source, "--benchmark-cprofile=cumtime")
    result.assert_outcomes(passed=1)
    assert "the_work" in result.stdout.str()


BAD = [
    (["--gpu-label=a/b"], "label 'a/b'"),
    (["--hidden=12,x"], "expected positive whole numbers"),
    (["--impls=fast"], "expected some of eager, torch"),
    (["--max-samples=0"], "expected"),
    (["--cell-seconds=-1"], "expected"),
    (["--preset-size=huge"], "--preset-size"),
    (["--benchmark-json=bench_it.py/out.json"], "bench_it.py/out.json"),
    (["--benchmark-json=."], "--benchmark-json"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[a[0] for a, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(arguments: list[str], words: str, suite: Any) -> None:
    result = suite(SUITE, *arguments)
    output = result.stdout.str() + result.stderr.str()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert words in output and "Traceback" not in output
    assert sorted(p.name for p in suite.path.iterdir() if not p.name.startswith(("__", "."))) == ["bench_it.py"]


INI = """
[pytest]
filterwarnings =
    error
    default::pytest_benchmark.logger.PytestBenchmarkWarning
"""


@pytest.mark.parametrize("value", ["--impls=fast", "--gpu-label=a/b"])
def test_bad_input_stays_one_line_where_warnings_are_errors(value: str, suite: Any, pytester: pytest.Pytester) -> None:
    pytester.makeini(INI)
    result = suite(SUITE, value, "--benchmark-json=deep/out.json")
    output = result.stdout.str() + result.stderr.str()
    assert result.ret == pytest.ExitCode.USAGE_ERROR and "Traceback" not in output
    assert not (suite.path / "deep").exists()


def test_cards_compare_where_warnings_are_errors(suite: Any, pytester: pytest.Pytester) -> None:
    pytester.makeini(INI)
    suite(SUITE, "--benchmark-autosave", "--gpu-label=one").assert_outcomes(passed=3, skipped=1)
    result = suite(SUITE, "--benchmark-compare", "--gpu-label=two")
    result.assert_outcomes(passed=3, skipped=1)
    assert result.ret == 0


def test_an_experiment_without_the_named_values_has_no_cells(suite: Any) -> None:
    source = (
        SUITE
        + """
@cells(quick=[dict(impl=["graph"])], choices=dict(impl=["graph"]))
def test_other(measure, impl):
    measure.samples([1.0], timing="host")
"""
    )
    suite(source, "--impls=graph").assert_outcomes(passed=1, skipped=1)  # pytest's own skip of an empty set
    assert suite(source, "--impls=torch,fast").ret == pytest.ExitCode.USAGE_ERROR


def test_an_expected_failure_is_a_skipped_cell(suite: Any) -> None:
    source = """
import pytest

@pytest.mark.xfail(reason="known")
def test_it(measure):
    raise ValueError("x")

def test_other(measure):
    measure(lambda: 1)
"""
    suite(source, "--benchmark-json=out.json").assert_outcomes(passed=1, xfailed=1)
    assert "known" in load(suite.path / "out.json")["skipped"][0]["reason"]


@pytest.mark.parametrize(
    ("gib", "rung"),
    [(4.0, "quick"), (5.6, "laptop"), (7.6, "laptop"), (15.6, "desktop"), (23.6, "desktop"), (39.4, "datacenter")],
)
def test_the_rung_follows_from_the_memory_that_a_card_reports(gib: float, rung: str) -> None:
    from tinylm.bench.plugin import RUNG_MEMORY_GIB

    assert next(name for name, least in RUNG_MEMORY_GIB.items() if gib >= least) == rung


def test_a_gpu_asked_for_where_there_is_none_is_one_line(pytester: pytest.Pytester, suite: Any) -> None:
    if torch is None or torch.cuda.is_available():
        pytest.skip("needs torch and a machine without a GPU")
    suite(SUITE)  # writes the file
    result = pytester.runpytest_inprocess(*LOADED, "--device=cuda", "bench_it.py")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--device cpu" in result.stderr.str() + result.stdout.str()
