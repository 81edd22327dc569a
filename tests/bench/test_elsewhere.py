"""Suites elsewhere: what they can use without a model or torch, and that those which use nothing stay as they are."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLUGIN = "tinylm.bench.plugin"
# Where tinylm is installed, its entry point loads the plugin; in a bare checkout it is named, and then no other plugin
# that happens to be installed is waited for.
INSTALLED = any(entry.name == PLUGIN for entry in importlib.metadata.entry_points(group="pytest11"))
BARE = ["-p", "pytest_benchmark.plugin"]
WITH, WITHOUT = ([], ["-p", f"no:{PLUGIN}"]) if INSTALLED else ([*BARE, "-p", PLUGIN], BARE)

# Python imports this by itself when it starts: each process writes down what it had imported when it ended.
SITE = """
import atexit, os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

def end():
    with open(os.path.join(os.path.dirname(__file__), f"{os.getpid()}.modules"), "w") as file:
        print(*sys.modules, file=file)

if os.environ["TORCH"] == "blocked":
    sys.meta_path.insert(0, Blocked())
atexit.register(end)
"""
COMMANDS = {
    "pytest": [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider"],
    "tinylm-bench": [sys.executable, "-c", "from tinylm.bench.cli import app; app()"],
}


class Elsewhere:
    """A folder with a suite, outside of this repository."""

    def __init__(self, folder: Path, torch: bool, **files: str) -> None:
        self.folder, self.site = folder / "suite", folder / "site-of-python"
        self.site.mkdir()
        self.folder.mkdir()
        (self.site / "sitecustomize.py").write_text(SITE, encoding="utf-8")
        for name, text in files.items():
            (self.folder / f"{name}.py").write_text(text, encoding="utf-8")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TINYLM_"))}
        paths = [str(self.site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = clean | {"PYTHONPATH": os.pathsep.join(paths), "TORCH": "free" if torch else "blocked"}
        if not INSTALLED:
            self.environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

    def run(self, line: str, plugin: list[str] = WITH, status: int = 0) -> str:
        name, *arguments = shlex.split(line)
        command = [*COMMANDS[name], *(plugin if name == "pytest" else []), *arguments]
        environment = self.environment | {"STARTED_BY": str(os.getpid())}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == status, said
        return said

    def load(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def imported(self) -> set[str]:
        """By any process until now, since the last time."""
        found: set[str] = set()
        for file in self.site.glob("*.modules"):
            found |= set(file.read_text(encoding="utf-8").split())
            file.unlink()
        return found


def ours(modules: set[str]) -> set[str]:
    """Modules of tinylm that a suite without a model has no use for."""
    return {name for name in modules if re.match(r"tinylm\.(?!bench\b)", name)}


def blocks(heading: str, language: str) -> str:
    """The code of a section of the guide."""
    (section,) = re.findall(rf"^## {heading}.*?\n(.*?)^## ", GUIDE, re.MULTILINE | re.DOTALL)
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return code


def test_the_guides_suite_runs_without_torch(tmp_path: Path) -> None:
    """Its commands as they stand there: measure, label, compare, report."""
    suite = Elsewhere(tmp_path, torch=False, bench_digest=blocks("A suite of your own", "python"))
    said = {}
    for line in blocks("A suite of your own", "bash").splitlines():
        said[line.split()[0], line.split()[1]] = suite.run(line)
        modules = suite.imported()
        assert any(name.startswith("tinylm.bench.") for name in modules)
        assert not ours(modules) and "torch" not in modules, line
    one = suite.load("one.json")
    assert one["machine_info"]["label"] == "mine" and one["machine_info"]["device"]["torch"] is None
    assert len(one["benchmarks"]) == 4 and one["failed"] == []
    for cell in one["benchmarks"]:
        info = cell["extra_info"]
        assert info["timing"] == "host" and info["bytes"] == cell["params"]["size"]
        assert info["bytes_per_s"] == pytest.approx(info["bytes"] / cell["stats"]["median"])
        assert info["ceiling_bytes_per_s"] is None and "of_ceiling" not in info
    assert said["tinylm-bench", "compare"].count("digest[") == 4
    page = (suite.folder / "site" / "index.html").read_text(encoding="utf-8")
    assert "test_digest" in page and "blake2b" in page and "mine" in page


def test_the_guides_experiment_runs_with_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    suite = Elsewhere(tmp_path, torch=True, bench_softmax=blocks("An experiment", "python"))
    suite.run("pytest bench_softmax.py --benchmark-json=out.json --device=cpu --preset-size=quick --max-samples=5")
    document = suite.load("out.json")
    assert document["machine_info"]["label"] == "cpu" and document["machine_info"]["device"]["torch"]
    assert [cell["params"]["hidden"] for cell in document["benchmarks"]] == [1024, 4096]
    assert all(0 < cell["extra_info"]["error"] < 1e-5 for cell in document["benchmarks"])
    assert not ours(suite.imported())


FOREIGN = """
import os, sys

def test_plain():
    assert os.getppid() == int(os.environ["STARTED_BY"])  # in the process that was started, no other

def test_timed(benchmark):
    benchmark.pedantic(len, args=("a",), rounds=3)
"""


def test_a_suite_that_uses_nothing_of_ours_stays_as_it_is(tmp_path: Path) -> None:
    suite = Elsewhere(tmp_path, torch=True, test_it=FOREIGN)
    said, modules, documents = [], [], []
    for plugin in (WITHOUT, WITH):
        text = suite.run("pytest test_it.py --benchmark-json=out.json --benchmark-columns=rounds", plugin)
        said.append(re.sub(r"in [\d.]+s|^plugins: .*", "", text, flags=re.MULTILINE))
        modules.append(suite.imported())
        documents.append(suite.load("out.json"))
    assert said[0] == said[1]
    assert sorted(path.name for path in suite.folder.iterdir() if path.name[0] not in "._") == [
        "out.json",
        "test_it.py",
    ]
    for found in documents:
        del found["datetime"], found["machine_info"]["cpu"], found["benchmarks"][0]["stats"]
    assert documents[0] == documents[1]
    added = {name.partition(".")[0] for name in modules[1] - modules[0]}
    assert added - sys.stdlib_module_names == {"tinylm"}
    # Light ones: what measures, reads devices or runs processes is imported when a cell of ours is there.
    heavy = {"measure", "trial", "proof", "machine", "device", "compare", "stats", "isolated", "profiling", "report"}
    assert not {f"tinylm.bench.{name}" for name in heavy} & modules[1]
    suite.run("pytest test_it.py --benchmark-json=out.json --gpu-label=mine")  # unless it asks for a label
    assert suite.load("out.json")["machine_info"]["label"] == "mine"


# As projects with GPU kernels have them.
CONFTEST = """
import pytest

def pytest_addoption(parser):
    parser.addoption("--device", help="a card of theirs")
    parser.addoption("--rows", type=int, choices=(3, 4))
    parser.addoption("--again", dest="retry", action="store_true")

@pytest.fixture
def theirs(request):
    return [request.config.getoption(name) for name in ("--device", "--rows", "--again", "--profile")]
"""
OTHER = """
def pytest_addoption(parser):
    parser.addoption("--profile", action="store_true", dest="energy")
"""
CLASH = """
def test_it(measure, theirs):
    assert theirs == ["gpu7", 4, True, True]
    assert measure.device == "cpu"
    measure(lambda: sum(range(10)))
"""


def test_options_of_the_same_name_stay_theirs(tmp_path: Path) -> None:
    suite = Elsewhere(tmp_path, torch=False, conftest=CONFTEST, other=OTHER, test_it=CLASH)
    theirs = "pytest -p other --device=gpu7 --rows 4 --again --profile --max-samples=5 --min-samples=5"
    suite.run(f"{theirs} --tinylm-device=cpu --threshold=1%")
    helped = suite.run(f"{theirs} --help")
    for name in ("--device", "--tinylm-device", "--rows", "--tinylm-rows", "--tinylm-profile", "--energy", "--retry"):
        assert len(re.findall(rf"^ +{name}\b", helped, re.MULTILINE)) == 1, name
    assert "--profile torch: torch is not installed" in suite.run(f"{theirs} --tinylm-profile=torch", status=4)


def test_a_conftest_may_name_the_plugin(tmp_path: Path) -> None:
    conftest = CONFTEST + f'pytest_plugins = ["other", "{PLUGIN}"]\n'
    suite = Elsewhere(tmp_path, torch=False, conftest=conftest, other=OTHER, test_it=CLASH)
    options = "--device=gpu7 --rows 4 --again --profile --tinylm-device=cpu --max-samples=5 --min-samples=5"
    suite.run(f"pytest {options}", [] if INSTALLED else BARE)
