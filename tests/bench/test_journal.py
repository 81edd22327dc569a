"""The journal: what it holds, how a run resumes from it, and the JSON that is made from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from suites import CONFTEST, Suite
from typer.testing import CliRunner

from tinylm.bench import cli, journal, results
from tinylm.bench.results import BrokenFile

HEADER = {"journal": 1, "pid": 7, "machine_info": {"label": "cpu"}, "pytest_benchmark": "5.3.0", "started": "then"}


def cell(name: str, outcome: str = "measured", **more: Any) -> dict[str, Any]:
    found = {"fullname": f"bench_it.py::{name}", "name": name, "group": None, "params": None, "outcome": outcome}
    return found | {"extra_info": {}} | ({"data": [1.0, 3.0]} if outcome == "measured" else {"reason": "why"}) | more


def start(name: str) -> dict[str, Any]:
    return {"start": f"bench_it.py::{name}", "name": name, "group": "g", "params": {"n": 1}}


def written(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "out.journal.jsonl"
    journal.create(path, HEADER, *entries)
    return path


def test_a_torn_line_is_passed_over_and_what_follows_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, start("a"), cell("a"), start("b"))
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(json.dumps(cell("b")).encode()[:-9])  # killed here
    assert list(journal.read(path).cells) == ["bench_it.py::a"]
    running = journal.read(path).running
    assert running is not None and running["name"] == "b"
    journal.append(path, HEADER, start("b"), cell("b"))
    assert path.read_bytes().startswith(whole)  # nothing is ever taken away
    found = journal.read(path)
    assert list(found.cells) == ["bench_it.py::a", "bench_it.py::b"] and found.running is None and found.latest == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]\n", b'{"start": "x"}\n', b'{"journal": 2}\n'])
def test_what_is_no_journal_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.journal.jsonl"
    path.write_bytes(content)
    for file in (path, tmp_path / "out.json", tmp_path / "none.json"):
        with pytest.raises(BrokenFile) as refused:
            journal.load(file)
        assert len(str(refused.value).splitlines()) == 1


def test_a_cell_finished_twice_counts_as_it_was_last_and_retry_forgets_all_but_measured(tmp_path: Path) -> None:
    path = written(tmp_path, cell("a", "failed"), cell("b", "skipped"), cell("c"), cell("a"))
    assert [c["outcome"] for c in journal.read(path).cells.values()] == ["skipped", "measured", "measured"]
    journal.append(path, HEADER | {"retry": True})
    assert [c["name"] for c in journal.read(path).cells.values()] == ["c", "a"]


def test_json_made_from_a_journal_is_read_by_both_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, cell("a"), cell("b", "skipped"), cell("c"), cell("d", "failed"), start("e"))
    path.open("a").write('{"fullname": "bench_')
    (tmp_path / "out.json").write_text('{"machine_info": {')  # killed while it was written
    done = CliRunner().invoke(cli.app, ["recover", "out.journal.jsonl"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("out.json: 2 measured, 1 skipped, 1 failed; bench_it.py::e: the run ended")
    assert CliRunner().invoke(cli.app, ["recover", "out.journal.jsonl"]).exit_code == 2  # a sound file is there
    assert CliRunner().invoke(cli.app, ["recover", "out.journal.jsonl", "-o", "2.json"]).exit_code == 0
    rows, broken = results.read(["out.json"])
    assert not broken and [(row["name"], row["outcome"]) for row in rows] == [
        *(("a", "measured"), ("c", "measured"), ("b", "skipped"), ("d", "failed"), ("e", "failed")),
    ]
    assert rows[-1]["reason"] == journal.UNFINISHED and rows[0]["median"] == 2.0 and rows[0]["label"] == "cpu"
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "out.json", "2.json"]
    assert "4 tests" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


ALL = """
@pytest.mark.parametrize("n", [1, 2, 3])
def test_cell(measure, n):
    measured(measure, f"cell{n}", n)

def test_wrong(measure):
    call("wrong")
    assert (HERE / "mended").exists(), "wrong"

def test_cannot(measure):
    call("cannot")
    pytest.skip("cannot")
"""
ONCE = {"cell1": 1, "cell2": 1, "cell3": 1, "wrong": 1, "cannot": 1}


@pytest.fixture
def finished(tmp_path: Path) -> Suite:
    """A suite that was run once."""
    suite = Suite(tmp_path, ALL)
    status, output = suite.run("--in-process")
    assert status == 1 and suite.calls == ONCE, output
    return suite


def test_recovered_is_what_pytest_benchmark_writes(finished: Suite) -> None:
    whole = finished.document
    made = journal.document(journal.read(finished.journal))
    assert whole.keys() <= made.keys() | {"wall_s"}
    assert made["version"] == whole["version"] and made["commit_info"]["id"] == "c0ffee"
    for key in ("machine_info", "commit_info", "skipped", "failed", "null_reasons"):
        assert made[key] == whole[key]
    for ours, theirs in zip(made["benchmarks"], whole["benchmarks"], strict=True):
        assert ours | {"options": {}} == theirs | {"options": {}}
    header, *lines = finished.lines()
    assert header["argv"][-1] == "--in-process" and header["label"] == "cpu"
    assert [next(iter(line)) for line in lines] == ["start", "fullname"] * 5 + ["end"]
    assert all(line["wall_s"] > 0 and line["at"] for line in lines if "fullname" in line)


def test_finished_cells_are_taken_over_whatever_became_of_them(finished: Suite) -> None:
    before = finished.document
    status, output = finished.run("--in-process", "--resume=out.json")
    assert status == 1 and finished.calls == ONCE, output
    assert "5 finished cells, 5 of the 5 of this run" in output
    for section in ("skipped", "failed"):
        assert finished.document[section] == before[section]
    for now, then in zip(finished.document["benchmarks"], before["benchmarks"], strict=True):
        assert now | {"options": {}} == then | {"options": {}}
    # Mended, and asked for: all but the measured once more.
    (finished.folder / "mended").touch()
    status, output = finished.run("--in-process", "--resume=out.json", "--retry")
    assert finished.calls == ONCE | {"wrong": 2, "cannot": 2} and "failed" not in output.splitlines()[-1]
    assert finished.names("failed") == [] and len(finished.names("measured")) == 3


def test_another_file_another_selection_and_no_journal(finished: Suite) -> None:
    finished.json.rename(finished.folder / "old.json")
    finished.journal.unlink()
    status, output = finished.run("--in-process", "--resume=old.json", "-k", "cell")
    assert status == 0 and finished.calls == ONCE, output
    # Cells that were not selected this time are in the file all the same, and in its journal.
    assert sorted(finished.names("measured")) == ["cell[1]", "cell[2]", "cell[3]"]
    assert finished.names("failed") == ["wrong"] and finished.names("skipped") == ["cannot"]
    assert len(journal.read(finished.journal).cells) == 5


def test_a_file_of_another_machine_is_refused_and_of_another_commit_is_told(finished: Suite) -> None:
    kept = finished.journal.read_bytes(), finished.json.read_bytes()
    status, output = finished.run("--in-process", "--resume=out.json", "--gpu-label=other")
    assert status == pytest.ExitCode.USAGE_ERROR and "measured on cpu (" in output and "this is other (" in output
    assert "Traceback" not in output and finished.journal.read_bytes() == kept[0]
    # Of another length: Python knows by it, and by the second, that what it has compiled is out of date.
    (finished.folder / "conftest.py").write_text(CONFTEST.replace("c0ffee", "decade5"))
    status, output = finished.run("--in-process", "--resume=out.journal.jsonl")
    assert status == 1 and "that was at commit c0ffee, this is decade5" in output


@pytest.mark.parametrize("arguments", [("--resume=none.json",), ("--retry",), ("--resume=bench_it.py",)])
def test_bad_resume_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    suite = Suite(tmp_path, ALL)
    status, output = suite.run("--in-process", *arguments)
    assert status == pytest.ExitCode.USAGE_ERROR and arguments[0].partition("=")[0] in output
    assert "Traceback" not in output and not suite.journal.exists()


def test_a_new_run_keeps_the_journal_of_one_that_did_not_end(tmp_path: Path) -> None:
    suite = Suite(tmp_path, ALL)
    written(tmp_path, cell("a"), start("b"))
    _, output = suite.run("--in-process", "-k", "cannot")
    assert "the journal of a run that did not end, kept for --resume" in output
    assert list(journal.read(tmp_path / "out.old.journal.jsonl").cells) == ["bench_it.py::a"]
    assert "bench_it.py::a" not in journal.read(suite.journal).cells


GROUP = """
from tinylm.bench.measure import Case

@cells(quick=[dict(impl=["a", "b", "c", "d"])])
def test_peers(measure, impl):
    def build(value):
        def work():
            if not (HERE / f"done-{value}").exists():
                (HERE / f"done-{value}").touch()
                call(value)
            if value == "b" and (HERE / "bad").exists():
                os._exit(1)
        return Case(work)
    measure.interleaved("impl", build)
"""


def test_of_a_group_only_the_unfinished_peers_are_measured(tmp_path: Path) -> None:
    suite = Suite(tmp_path, GROUP)
    options = ("--min-samples=3", "--max-samples=3")
    suite.run("--in-process", "bench_it.py::test_peers[a]", *options)
    first = suite.document["benchmarks"][0]["stats"]["data"]
    for done in suite.folder.glob("done-*"):
        done.unlink()
    (suite.folder / "bad").touch()
    status, output = suite.run("--resume=out.json", *options)
    assert status == 1 and suite.names("measured") == ["peers[a]", "peers[c]", "peers[d]"], output
    assert suite.document["benchmarks"][0]["stats"]["data"] == first and suite.calls["a"] == 1
    assert suite.names("failed") == ["peers[b]"]  # and not the one that was measured together with it
