"""Small suites in folders of their own, run by a fresh pytest: what survives a process needs one that can be lost.

Without torch and with made-up machine facts such a process starts in well under a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Named here, because autoloading all installed plugins takes longer than a small suite.
PLUGINS = ("-p", "pytest_benchmark.plugin", "-p", "tinylm.bench.plugin")

CONFTEST = """
import sys

sys.modules["torch"] = None

def pytest_benchmark_generate_machine_info(config):
    return {"cpu": {}, "node": "here"}

def pytest_benchmark_generate_commit_info(config):
    return {"id": "c0ffee", "dirty": False}
"""

# How often a cell's own code ran is in calls.txt; each cell's samples are its own.
HEAD = """
import os, signal, time
from pathlib import Path
import pytest
from tinylm.bench import cells

HERE = Path(__file__).parent

def call(name):
    with open(HERE / "calls.txt", "a") as calls:
        calls.write(f"{name}\\n")

def measured(measure, name, number=1):
    call(name)
    measure.extra_info["made"] = name
    measure.samples([0.25 * number, 0.5 * number], timing="host")
"""


class Suite:
    """A folder with a suite, and what its runs left there."""

    def __init__(self, folder: Path, source: str, conftest: str = CONFTEST) -> None:
        self.folder = folder
        self.output = folder / "output.txt"
        self.json = folder / "out.json"
        self.journal = folder / "out.journal.jsonl"
        (folder / "bench_it.py").write_text(HEAD + source, encoding="utf-8")
        (folder / "conftest.py").write_text(conftest, encoding="utf-8")
        (folder / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n", encoding="utf-8")

    def command(self, *arguments: str, plugins: tuple[str, ...] = PLUGINS) -> list[str]:
        fixed = ["--device=cpu", "--benchmark-json=out.json", "--benchmark-columns=median", "-v"]
        return [sys.executable, "-m", "pytest", *plugins, *fixed, *arguments]

    def environment(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TINYLM_"))}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return clean | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": paths}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        clean = self.environment() | environment
        with self.output.open("w") as output:  # not a pipe: a full one would stop the run
            return subprocess.Popen(
                self.command(*arguments), cwd=self.folder, env=clean, stdout=output, stderr=subprocess.STDOUT
            )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit status and output of a run."""
        with self.start(*arguments, **environment) as process:
            status = process.wait(timeout=120)
        return status, self.output.read_text(encoding="utf-8")

    @property
    def calls(self) -> Counter[str]:
        path = self.folder / "calls.txt"
        return Counter(path.read_text(encoding="utf-8").split() if path.exists() else [])

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.json.read_text(encoding="utf-8"))

    def names(self, outcome: str) -> list[str]:
        section = {"measured": "benchmarks"}.get(outcome, outcome)
        return [cell["name"].removeprefix("test_") for cell in self.document[section]]

    def lines(self) -> Iterator[dict[str, Any]]:
        """The whole lines of the journal."""
        text = self.journal.read_text(encoding="utf-8") if self.journal.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    assert line.startswith("{")  # what a killed process had begun to write


# Imports once, and forks for each run: twenty starts would take longer than all that they measure.
FORKING = """
import os, sys
import pytest, pytest_benchmark.plugin, tinylm.bench.plugin

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        with open("output.txt", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os._exit(pytest.main(line.split()))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forking:
    """Runs of one suite, one after another, each in a process of its own that may be killed."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", FORKING]
        self.parent = subprocess.Popen(command, cwd=suite.folder, env=suite.environment(), **pipes)

    def start(self, *arguments: str) -> int:
        """The process id of a run."""
        assert self.parent.stdin is not None and self.parent.stdout is not None
        print(*self.suite.command(*arguments)[3:], file=self.parent.stdin, flush=True)
        return int(self.parent.stdout.readline())

    def status(self) -> int:
        """How it ended; a negative number is that of a signal."""
        assert self.parent.stdout is not None
        return int(self.parent.stdout.readline())

    def close(self) -> None:
        self.parent.communicate()
