"""Profiles instead of timings: torch's traces, reports of Nsight Compute (a stand-in for it), and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from suites import CONFTEST, Suite

from tinylm.bench import nsight
from tinylm.bench.profiling import MOST_CELLS, Profiling

CELLS = """
from tinylm.bench.case import Case

def case(name):
    call(name)
    return Case(lambda: sum(range(100)), check=lambda total: float(total != 4950))

@pytest.mark.parametrize("size", [1, 2])
def test_one(measure, size):
    made = case(f"one-{size}")
    measure(made.fn, check=made.check)

@cells(quick=[dict(impl=["a", "b"])])
def test_peers(measure, impl):
    measure.interleaved("impl", case)

def test_samples(measure):
    measure.samples([1.0], timing="host")

def test_wrong(measure):
    measure(lambda: 1, check=lambda result: float("nan"))

def test_skipped(measure):
    pytest.skip("cannot")

def test_none_of_ours():
    call("plain")
"""
PROFILED = {"one[1]": "one-1", "one[2]": "one-2", "peers[a]": "peers-a", "peers[b]": "peers-b"}

# Records how it was called, makes what it would export, and runs the program.
NCU = """#!{python}
import json, os, subprocess, sys
from pathlib import Path

with open({log!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
at = sys.argv.index("--export") + 1
status = subprocess.run(sys.argv[at + 1:]).returncode
{after}
sys.exit(status)
"""
EXPORTS = "Path(sys.argv[at]).write_text('a report')"
FORBIDDEN = "print('==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'); status = 1"
# Here it need not be a GPU.
ANYWHERE = """
from tinylm.bench import profiling
profiling.Profiling.refusal = lambda self, machine: None
"""


def with_ncu(folder: Path, after: str) -> dict[str, str]:
    """The environment of a run that finds a stand-in for Nsight Compute."""
    program = folder / "bin" / "ncu"
    program.parent.mkdir()
    program.write_text(NCU.format(python=sys.executable, log=str(folder / "ncu.jsonl"), after=after), encoding="utf-8")
    program.chmod(0o755)
    return {"PATH": os.pathsep.join([str(program.parent), os.environ["PATH"]])}


def sections(suite: Suite) -> tuple[dict[str, Any], dict[str, str]]:
    """The skipped cells by name, and the reasons of the failed ones; nothing was timed."""
    assert suite.document["benchmarks"] == []
    by_name = {
        name: {c["name"].removeprefix("test_"): c for c in suite.document[name]} for name in ("skipped", "failed")
    }
    return by_name["skipped"], {name: cell["reason"] for name, cell in by_name["failed"].items()}


def test_each_selected_cell_gets_a_trace_and_no_timing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    suite = Suite(tmp_path, CELLS, CONFTEST.replace('sys.modules["torch"] = None', ""))
    suite.json.write_text('{"benchmarks": [], "skipped": [{"name": "of an earlier run of this kind"}]}')
    status, output = suite.run("--profile=torch", "-k", "not (one and 2)")
    assert status == 1 and "out.peers-a.trace.json.gz" in output, output
    skipped, failed = sections(suite)
    assert failed == {"wrong": "CheckFailed: the check gives an error of nan: a result that is not finite is wrong"}
    assert skipped["skipped"]["reason"] == "cannot" and "nothing here" in skipped["samples"]["reason"]
    for cell, name in PROFILED.items():
        file = f"out.{name}.trace.json.gz"
        if cell == "one[2]":
            assert not (tmp_path / file).exists()
            continue
        assert skipped[cell]["reason"] == f"profiled: {file}" and skipped[cell]["extra_info"] == {"profile": file}
        trace = json.loads(gzip.decompress((tmp_path / file).read_bytes()))
        events = [event for event in trace["traceEvents"] if event.get("name") == f"test_{cell}"]
        assert 1 <= len(events) <= 5 and all(event["dur"] > 0 for event in events)
    # Only the selected one of a group is built, and all else runs as usual.
    assert suite.calls == {"one-1": 1, "a": 1, "b": 1, "plain": 1}


def test_each_selected_cell_runs_under_nsight_compute_by_itself(tmp_path: Path) -> None:
    suite = Suite(tmp_path, CELLS, CONFTEST + ANYWHERE)
    environment = with_ncu(tmp_path, EXPORTS)
    status, output = suite.run("--profile=ncu", "-k", "not (one and 2)", **environment)
    assert status == 1 and "out.one-1.ncu-rep" in output, output
    skipped, failed = sections(suite)
    assert "CheckFailed: the check gives an error of nan" in failed["wrong"]
    assert skipped["skipped"]["reason"] == "cannot" and "nothing here" in skipped["samples"]["reason"]
    for cell in ("one[1]", "peers[a]", "peers[b]"):
        file = f"out.{PROFILED[cell]}.ncu-rep"
        assert skipped[cell]["reason"] == f"profiled: {file}" and skipped[cell]["extra_info"] == {"profile": file}
        assert (tmp_path / file).read_text() == "a report"
    # One process for each of ours, in which the others do not run; here the cells' own code never ran.
    assert suite.calls == {"one-1": 1, "a": 1, "b": 1, "plain": 1}
    lines = [json.loads(line) for line in (tmp_path / "ncu.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert ("--clock-control none" in " ".join(line)) and ("--profile-from-start off" in " ".join(line))
        own = suite.command("--profile=ncu", "-k", "not (one and 2)")
        assert line[-len(own) :] == own


def test_where_counters_may_not_be_read_it_is_said_once(tmp_path: Path) -> None:
    suite = Suite(tmp_path, CELLS, CONFTEST + ANYWHERE)
    status, output = suite.run("--profile=ncu", "-k", "one", **with_ncu(tmp_path, FORBIDDEN))
    assert status == 2 and "NVreg_RestrictProfilingToAdminUsers=0" in output, output
    assert len((tmp_path / "ncu.jsonl").read_text().splitlines()) == 1


MANY = f"""
@pytest.mark.parametrize("size", range({MOST_CELLS + 2}))
def test_it(measure, size):
    measured(measure, "it")
"""


def test_what_cannot_be_profiled_is_refused_in_one_line(tmp_path: Path) -> None:
    suite = Suite(tmp_path, MANY, CONFTEST + ANYWHERE)
    selected = f"--profile torch: {MOST_CELLS + 2} cells are selected, expected at most {MOST_CELLS}: choose with -k"
    for arguments, said in (
        (["--profile=torch"], selected),
        (["--profile=torch", "--benchmark-disable"], "not with --benchmark-disable"),
        (["--profile=torch", "--resume=out.json"], "not with --resume"),
    ):
        status, output = suite.run(*arguments)
        assert status == pytest.ExitCode.USAGE_ERROR and said in output and "Traceback" not in output, output
    assert not suite.calls and not suite.journal.exists()
    if tuple(map(int, version("pytest-benchmark").split(".")[:2])) < (5, 3):
        return  # it empties its file before anybody can look into it
    # Timings are not to be lost.
    suite.run("-k", "[1]")
    before = suite.json.read_bytes()
    status, output = suite.run("-k", "[1]", "--profile=torch")
    assert status == pytest.ExitCode.USAGE_ERROR and "out.json has timings" in output
    assert suite.json.read_bytes() == before
    assert suite.calls == {"it": 1}


def test_a_machine_that_cannot_profile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(tool: str, device: str, torch: str | None) -> str | None:
        profiling = Profiling.__new__(Profiling)
        profiling.tool = tool
        return profiling.refusal(SimpleNamespace(device=device, facts={"torch": torch}))  # type: ignore[arg-type]

    monkeypatch.setattr(nsight.shutil, "which", lambda *_, **__: None)
    assert why("torch", "cpu", "2.13") is None
    assert why("torch", "cpu", None) == "--profile torch: torch is not installed"
    assert "on the CPU" in (why("ncu", "cpu", "2.13") or "")
    assert (why("ncu", "cuda", "2.13") or "").startswith("--profile ncu: ncu is not on the PATH: install")


ON_A_GPU = """
import torch
from tinylm.bench.case import against

@cells(quick=[dict(dtype=["fp32"], impl=["kernel", "graph"])])
def test_add(measure, dtype, impl):
    measure(
        lambda x: x + 1,
        inputs=lambda: (torch.randn(1 << 20, device="cuda"),),
        check=against(lambda x: x.double() + 1, 1e-6),
        timing={"kernel": "cold", "graph": "graph"}[impl],
    )
"""


def test_on_a_gpu_both_tools_write_what_they_are_to(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    try:
        nsight.run([], [sys.executable, "-c", "import torch; torch.ones(1, device='cuda')"])
    except nsight.Unavailable as error:
        pytest.skip(str(error))
    suite = Suite(tmp_path, ON_A_GPU, CONFTEST.replace('sys.modules["torch"] = None', ""))
    names = ["add-fp32-kernel", "add-fp32-graph"]
    for tool in ("torch", "ncu"):
        status, output = suite.run(f"--profile={tool}", "--device=cuda")
        assert status == 0, output
        skipped, failed = sections(suite)
        assert not failed and [cell["reason"][:9] for cell in skipped.values()] == ["profiled:"] * 2
    for name in names:
        trace = json.loads(gzip.decompress((tmp_path / f"out.{name}.trace.json.gz").read_bytes()))
        assert any(event.get("cat") == "kernel" and "add" in event["name"] for event in trace["traceEvents"])
        report = tmp_path / f"out.{name}.ncu-rep"
        said = nsight.run(["--import", str(report), "--page", "raw", "--csv"], [], options=())
        assert "elementwise" in said and nsight.METRIC in said and nsight.FLUSH not in said
