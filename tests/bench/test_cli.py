"""The command: what it writes, what it says, and one line with exit status 2 for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import synthetic
from typer.testing import CliRunner, Result

from tinylm.bench import cli, plots, telemetry

FACTS = {"type": "cpu", "name": "A CPU", "memory_bytes": 1, "torch": None}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, on a machine of known facts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYLM_GPU_LABEL", raising=False)
    monkeypatch.setattr(telemetry, "resolve_device", lambda asked: "cpu")
    monkeypatch.setattr(telemetry, "device_facts", lambda device: dict(FACTS))
    return tmp_path


@pytest.fixture
def few_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plot instead of all, for tests of what is around them."""
    monkeypatch.setattr(plots, "PLOTS", {"kv_vs_nokv": plots.PLOTS["kv_vs_nokv"]})


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """Bad input: exit status 2, nothing on stdout, one line on stderr."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit) and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"tinylm-bench {arguments[0]}: ")
    return line


def test_merge_and_plot_from_results_by_default(here: Path, few_plots: None) -> None:
    synthetic.write_runs(here / "results", runs=2)
    result = call("merge")
    assert result.exit_code == 0 and not result.stderr
    tables = sorted((here / "results" / "tables").iterdir())
    assert [table.name for table in tables] == [
        *("ablation.csv", "decode.csv", "kv_cache.csv", "rmsnorm.csv", "vram.csv"),
    ]
    assert result.stdout.split() == [str(table.relative_to(here)) for table in tables]
    result = call("plot")
    assert result.exit_code == 0
    assert sorted(path.name for path in (here / "results" / "plots").iterdir()) == [
        *("kv_vs_nokv.csv", "kv_vs_nokv.png", "kv_vs_nokv.svg"),
    ]
    # What was made is not read as results.
    assert call("merge").exit_code == 0


@pytest.mark.parametrize("command", ["merge", "plot"])
def test_broken_files_are_named_and_the_others_processed(here: Path, command: str, few_plots: None) -> None:
    folder = synthetic.write_runs(here / "in", runs=1)
    (folder / "h200" / "main" / "broken.json").write_text('{"benchmarks": [')
    result = call(command, folder, "-o", here / "out")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "broken.json" in result.stderr and "not valid JSON" in result.stderr
    assert len(list((here / "out").iterdir())) in (3, 5)


def test_only_one_plot_and_a_line_for_one_without_data(here: Path) -> None:
    (here / "plain.json").write_text(json.dumps(synthetic.plain()))
    result = call("plot", "plain.json", "--only", "ablation")
    assert result.exit_code == 0 and result.stdout == "ablation: no measured cell of ablation\n"
    assert not (here / "results").exists()
    assert "expected one of kv_curve" in refused("plot", "plain.json", "--only", "ablatoin")


@pytest.mark.parametrize("command", ["merge", "plot", "compare"])
def test_missing_and_empty_inputs(here: Path, command: str) -> None:
    again = ["nowhere"] if command == "compare" else []
    assert "no such file or folder" in refused(command, "nowhere", *again)
    (here / "empty").mkdir()
    assert "tinylm-bench run" in refused(command, "empty", *again)
    assert [path.name for path in here.iterdir()] == ["empty"]


def test_an_output_that_cannot_be_written(here: Path, few_plots: None) -> None:
    synthetic.write_runs(here / "results", runs=1, labels=("cpu",))
    (here / "file").write_text("mine")
    for command in ("merge", "plot"):
        assert "cannot be written" in refused(command, "-o", "file")
    assert (here / "file").read_text() == "mine"


def test_compare_prints_and_writes(here: Path) -> None:
    base = synthetic.write_runs(here / "before" / "results", runs=3, labels=("h200",))
    new = synthetic.write_runs(here / "after" / "results", runs=3, labels=("h200",), slower=1.3)
    options = ["--csv", "out.csv", "--markdown", "out.md", "--threshold", "2%"]
    result = call("compare", base / "h200", new / "h200", *options)
    assert result.exit_code == 0 and not result.stderr, result.output
    cells = synthetic.document("h200")["benchmarks"]
    timed = [cell for cell in cells if "bench_vram" not in cell["fullname"]]
    assert f"{len(cells)} cells in both: " in result.stdout
    assert result.stdout.count("slower") >= len(timed)
    assert len((here / "out.csv").read_text().splitlines()) == len(cells) + 1
    assert (here / "out.md").read_text().startswith(f"### {base / 'h200'} → {new / 'h200'}, median\n")
    assert call("compare", base / "h200", new / "h200", "--threshold", "0.02").stdout == result.stdout
    several = call("compare", base / "h200", new / "h200", base / "h200", "--metric", "time,memory", "--changed")
    assert [line.rpartition(", ")[2] for line in several.stdout.splitlines() if " → " in line] == [
        *("median", "peak_allocated_bytes") * 2,
    ]
    assert "equivalent  \n" not in several.stdout and "runs are on both sides" in several.stdout
    across = call("compare", base / "h200", synthetic.write_runs(here / "results", 2, ("cpu",)) / "cpu")
    assert across.exit_code == 0 and "no verdicts" in across.stdout and "slower" not in across.stdout
    assert "several labels" in refused("compare", here, base)
    assert "expected one of time, tokens" in refused("compare", base, new, "--metric", "nonsense")
    assert "such as 2%" in refused("compare", base, new, "--threshold", "2")
    assert "expected one of slower" in refused("compare", base, new, "--fail-on", "more")


def test_compare_fails_on_what_is_asked(here: Path) -> None:
    base = synthetic.write_runs(here / "before" / "results", runs=3, labels=("h200",)) / "h200"
    new = synthetic.write_runs(here / "after" / "results", runs=3, labels=("h200",), slower=1.3) / "h200"
    cells = len(synthetic.document("h200")["benchmarks"])
    result = call("compare", base, new, "--fail-on", "slower")
    assert result.exit_code == 1
    assert result.stderr.startswith("--fail-on slower: ") and result.stderr.endswith(f" of {cells} cells\n")
    assert call("compare", base, new, "--fail-on", "faster").exit_code == 0
    assert call("compare", new, base, "--fail-on", "faster", "--fail-on", "slower").exit_code == 1
    assert call("compare", base, new, "--metric", "memory", "--fail-on", "any-change").exit_code == 0


def test_compare_of_single_files_states_too_few_runs(here: Path) -> None:
    folder = synthetic.write_runs(here / "results", runs=2, labels=("h200",)) / "h200" / "main"
    result = call("compare", *sorted(folder.iterdir()))
    assert result.exit_code == 0 and "too few runs" in result.stdout and "Too few runs in" in result.stdout
    # What cannot be judged is no pass.
    result = call("compare", *sorted(folder.iterdir()), "--fail-on", "slower")
    assert result.exit_code == 2 and "none of" in result.stderr and result.stderr.count("\n") == 1


def test_label_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("label").stdout == "cpu\n"
    assert call("label", "--gpu-label", "mine").stdout == "mine\n"
    monkeypatch.setenv("TINYLM_GPU_LABEL", "from-env")
    assert call("label").stdout == "from-env\n"
    assert "a/b" in refused("label", "--gpu-label", "a/b")
    assert "names a folder" in refused("label", "--gpu-label", "tables")
    assert "expected auto, cuda or cpu" in refused("label", "--device", "gpu")


def test_label_of_files(here: Path) -> None:
    (here / "plain.json").write_text(json.dumps(synthetic.plain()))
    assert call("label", "plain.json").stdout == "plain: unlabelled\n"
    assert call("label", "plain.json", "--set", "my-card").stdout == "plain: my-card\n"
    before = (here / "plain.json").read_bytes()
    assert "a/b" in refused("label", "plain.json", "--set", "a/b")
    assert (here / "plain.json").read_bytes() == before
    assert "no files given" in refused("label", "--set", "x")
    assert "no such file" in refused("label", "missing.json", "--set", "x")
    (here / "broken.json").write_text("{")
    assert "not valid JSON" in refused("label", "broken.json", "--set", "x")
    assert (here / "broken.json").read_text() == "{"


class Entry:
    name, value = "ops", "tinylm.ops:doctor"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def load(self) -> Any:
        return self.answer


def test_doctor_shows_the_machine_and_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Any]:
        raise ImportError("no such\nlibrary")

    found = [("rmsnorm/torch", True, "", ""), ("rmsnorm/compile", False, "no C++ compiler", "install g++")]
    entries = [Entry(lambda: found), Entry(broken)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries if group == "tinylm.doctor" else [])
    result = call("doctor")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["label", "cpu"] in lines and ["name", "A", "CPU"] in lines
    assert ["rmsnorm/torch", "yes"] in lines
    assert ["rmsnorm/compile", "no", "no", "C++", "compiler", "install", "g++"] in lines
    assert "ImportError: no such library" in result.stdout


def test_doctor_tells_of_a_card_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(asked: str) -> str:
        raise telemetry.MachineError("a card is here but torch cannot use it: install the CUDA build")

    monkeypatch.setattr(telemetry, "resolve_device", unusable)
    result = call("doctor")
    assert result.exit_code == 0 and "install the CUDA build" in result.stdout
    # Elsewhere the same ends the command.
    assert "install the CUDA build" in refused("label")
    Path("benchmarks").mkdir()
    assert "install the CUDA build" in refused("run")
    assert not Path("results").exists()


# --- run ---

BENCH = """
def test_fast(benchmark):
    benchmark.pedantic(len, args=("a",), rounds=3)

def test_failing():
    assert {passing}
"""
# Stands for our plugin, so that these tests are about the command alone.
OPTIONS = """
def pytest_addoption(parser):
    for name in ("--gpu-label", "--device", "--preset-size", "--contexts"):
        parser.addoption(name)

def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["label"] = config.getoption("--gpu-label")
    machine_info["size"] = config.getoption("--preset-size")
    machine_info["contexts"] = config.getoption("--contexts")
"""


@pytest.fixture
def checkout(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (here / "benchmarks").mkdir()
    (here / "benchmarks" / "bench_it.py").write_text(BENCH.format(passing=True))
    (here / "conftest.py").write_text(OPTIONS)
    (here / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\naddopts = -p pytest_benchmark.plugin\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return here


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_run_leaves_labelled_json_and_tables_and_says_where(checkout: Path, few_plots: None) -> None:
    result = call("run", "--preset-size", "quick", "--contexts", "512,1024", "-q")
    assert result.exit_code == 0, result.output
    file, table = files(checkout / "results")
    assert table == "tables/it.csv"
    assert file.startswith("cpu/main/2") and file.endswith("Z.json")
    assert f"results/{file}" in result.stdout and f"results/{table}" in result.stdout
    machine = json.loads((checkout / "results" / file).read_text())["machine_info"]
    assert (machine["label"], machine["size"], machine["contexts"]) == ("cpu", "quick", "512,1024")


def test_runs_of_one_minute_are_all_kept(checkout: Path, few_plots: None) -> None:
    options = ["--results", "kept", "--suite", "short", "--gpu-label", "mine"]
    assert [call("run", *options).exit_code for _ in range(2)] == [0, 0]
    assert len(list((checkout / "kept" / "mine" / "short").glob("*.json"))) == 2


def test_failed_cells_give_pytests_status_and_results_all_the_same(checkout: Path, few_plots: None) -> None:
    (checkout / "benchmarks" / "bench_it.py").write_text(BENCH.format(passing=False))
    assert call("run").exit_code == 1
    assert len(files(checkout / "results")) == 2
    # A path replaces the folder of benchmarks; an expression does not, even where it is the name of a file.
    assert call("run", "benchmarks/bench_it.py::test_fast", "--results", "other").exit_code == 0
    (checkout / "fast").write_text("")
    assert call("run", "-k", "fast", "--results", "other").exit_code == 0


@pytest.mark.parametrize("arguments", [("--no-such-option",), ("-k", "nothing"), ("--benchmark-disable",)])
def test_a_run_without_results_leaves_nothing(checkout: Path, arguments: tuple[str, ...]) -> None:
    result = call("run", *arguments)
    assert result.exit_code not in (0, 2) or arguments == ("--no-such-option",)
    assert result.exit_code == 2 or "no results" in result.stderr  # of bad input pytest says enough
    assert files(checkout / "results") == []


def test_a_run_that_died_leaves_its_journal_and_says_so(checkout: Path) -> None:
    died = "import os, pathlib\n\ndef test_it(request):\n"
    died += "    given = request.config.getoption('benchmark_json')\n"
    died += "    path = given if isinstance(given, pathlib.Path) else pathlib.Path(given.name)\n"  # before 5.3 a file
    died += "    path.with_suffix('.journal').write_text('measured')\n    os._exit(9)\n"
    (checkout / "benchmarks" / "bench_it.py").write_text(died)
    result = call("run")
    assert result.exit_code == 9
    # pytest-benchmark before 5.3 opens its file at the start
    (left,) = (name for name in files(checkout / "results") if not name.endswith(".json"))
    assert left.endswith(".journal") and left in result.stderr
    assert "no JSON files" in refused("merge")


def test_run_refuses_bad_input_before_anything_is_written(checkout: Path) -> None:
    assert "--benchmark-json" in refused("run", "--benchmark-json=x.json")
    assert "pytest directly" in refused("run", "--profile", "torch")
    assert "'a/b'" in refused("run", "--gpu-label", "a/b")
    assert "'a/b'" in refused("run", "--suite", "a/b")
    assert "expected auto" in refused("run", "--device", "gpu")
    (checkout / "file").write_text("mine")
    assert "cannot be written" in refused("run", "--results", "file")
    (checkout / "benchmarks").rename(checkout / "moved")
    assert "no folder benchmarks" in refused("run")
    assert files(checkout) == ["conftest.py", "file", "moved/bench_it.py", "pytest.ini"]


def test_the_command_imports_neither_torch_nor_pandas() -> None:
    code = "import sys, tinylm.bench.cli; print({'torch', 'pandas', 'seaborn', 'scipy'} & set(sys.modules))"
    root = Path(cli.__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "set()\n"
