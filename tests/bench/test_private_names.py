"""pytest-benchmark is used by its public names alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.AST, theirs: set[str]) -> set[str]:
    """Private names that code takes from other objects than `self`, where they are among `theirs`.

    Of what is imported from pytest-benchmark, and of anything called benchmark, every private name counts.
    """
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            certain = owner.strip("_") in ("benchmark", "pytest_benchmark", "benchmarksession")
            if certain or (owner not in ("self", "cls") and node.attr in theirs):
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pytest_benchmark":
            found |= {
                name for name in [*(node.module or "").split("."), *(a.name for a in node.names)] if private(name)
            }
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {name for names in parts if names[0] == "pytest_benchmark" for name in names if private(name)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & theirs  # as getattr takes it
    return found


def defined(tree: ast.AST) -> set[str]:
    """The private names that a module gives: of attributes, functions and classes."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return set(filter(private, names))


def test_no_private_name_of_pytest_benchmark_is_used() -> None:
    import pytest_benchmark

    installed = Path(pytest_benchmark.__file__).parent.glob("*.py")
    theirs = set().union(*(defined(ast.parse(file.read_text(encoding="utf-8"))) for file in installed))
    assert "_benchmarksession" in theirs
    files = [*(ROOT / "tinylm").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "conftest.py"]
    assert len(files) > 40
    for file in files:
        assert not private_names(ast.parse(file.read_text(encoding="utf-8")), theirs), file


@pytest.mark.parametrize(
    "code",
    [
        "from pytest_benchmark.fixture import _x",
        "from pytest_benchmark._x import a",
        "import pytest_benchmark._x",
        "pytest_benchmark._x",
        "benchmark._x()",
        "self._benchmark._x = 1",
        "config._benchmarksession",
        "getattr(config, '_benchmarksession')",
    ],
)
def test_the_search_finds_every_form(code: str) -> None:
    assert private_names(ast.parse(code), {"_benchmarksession"})


@pytest.mark.parametrize("code", ["self._benchmark.name", "self._x", "module._own", "x.__dict__"])
def test_the_search_finds_nothing_else(code: str) -> None:
    assert not private_names(ast.parse(code), {"_benchmarksession"})
