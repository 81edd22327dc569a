"""`tinylm-bench run` with the real plugin: what is lost on the way, and how it is continued."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from suites import CONFTEST, PLUGINS, ROOT, Suite
from typer.testing import CliRunner, Result

from tinylm.bench import cli, launch, plots, results

RUN = """
def test_first(measure):
    measured(measure, "first")

def test_ends(measure):
    call("ends")
    if os.environ["HOW"] == "exit":
        os._exit(1)
    if os.environ["HOW"] == "interrupt" and not (HERE / "interrupted").exists():
        (HERE / "interrupted").touch()
        raise KeyboardInterrupt
    pytest.fail("wrong")

def test_last(measure):
    measured(measure, "last")
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    (tmp_path / "benchmarks").mkdir()
    made = Suite(tmp_path / "benchmarks", RUN, CONFTEST)
    monkeypatch.chdir(tmp_path)
    for name in ("PYTEST_ADDOPTS", "TINYLM_GPU_LABEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(PLUGINS))
    monkeypatch.setattr(plots, "PLOTS", {})
    return made


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["run", "--device=cpu", "--gpu-label=here", *arguments])


def test_a_cell_that_crashes_is_in_the_file_with_all_others(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOW", "exit")
    result = call()
    assert result.exit_code == 1, result.output
    (file,) = Path("results/here/main").iterdir()  # and no hidden folder
    rows = {row["name"]: (row["outcome"], row.get("reason")) for row in results.read([file])[0]}
    assert rows == {
        "test_first": ("measured", None),
        "test_last": ("measured", None),
        "test_ends": ("failed", "crashed: the process ended with exit code 1 and no result"),
    }
    assert suite.calls == {"first": 1, "ends": 1, "last": 1}


def test_an_interrupted_run_says_how_it_goes_on(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOW", "interrupt")
    monkeypatch.setattr(sys, "argv", ["tinylm-bench", "run"])
    result = call()
    assert result.exit_code == 2 and "no results: pytest ended with status 2" in result.stderr, result.output
    again = re.search(r"`tinylm-bench run --resume (\S+)` goes on, `tinylm-bench recover \1`", result.stderr)
    assert again and not list(Path("results/here/main").glob("*.json"))
    result = call("--resume", again[1])
    assert result.exit_code == 1, result.output  # a cell fails
    (file,) = Path("results/here/main").iterdir()
    outcomes = {row["name"]: row["outcome"] for row in results.read([file])[0]}
    assert outcomes == {"test_first": "measured", "test_ends": "failed", "test_last": "measured"}
    assert suite.calls == {"first": 1, "ends": 2, "last": 1}


def test_failed_cells_are_kept_where_none_was_measured(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOW", "exit")
    result = call("-k", "ends")
    assert result.exit_code == 1, result.output
    (row,) = results.read(["results"])[0]
    assert row["outcome"] == "failed" and row["reason"].startswith("crashed")


def test_where_a_file_goes(tmp_path: Path) -> None:
    partial, final = launch.place(tmp_path, None)
    assert partial.parent.is_dir() and partial.parent.parent == final.parent == tmp_path
    assert launch.place(tmp_path, None)[1] != final  # in the same minute
    assert launch.place(tmp_path / "other", partial.parent / "it.journal.jsonl") == (partial, final)
    elsewhere = launch.place(tmp_path / "other", tmp_path / "a" / "it.journal.jsonl")
    assert elsewhere[1].parent == tmp_path / "other"
