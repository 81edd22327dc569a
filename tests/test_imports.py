"""Imports run one way, and `import tinylm` does nothing that a user did not ask for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tinylm"

# What each part may import of the others; a part is a module or a folder of tinylm. DESIGN.md says why.
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "ops": set(),
    "bench": set(),
    "cache": {"config"},
    "attention": {"ops", "cache"},
    "model": {"attention", "ops", "config", "cache"},
    "generate": {"model", "attention", "cache", "config", "ops", "checkpoint", "hf", "tokenizer"},
    "hf": {"model", "config"},
    "tokenizer": {"config"},
    "data": {"config", "tokenizer"},
    "optim": {"config", "parallel"},
    "parallel": {"config", "model"},
    "checkpoint": {"config", "model", "tokenizer"},
    "train": {"config", "model", "ops", "data", "tokenizer", "optim", "checkpoint", "parallel"},
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports when it runs, wherever in the file, by its full name."""
    package = ["tinylm", *path.relative_to(PACKAGE).parts[:-1]]
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            todo.extend(node.orelse)  # for type checkers alone
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            if origin == "tinylm":
                yield from (f"tinylm.{alias.name}" for alias in node.names)
            else:
                yield origin
        todo.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = part(path)
    assert own in MAY_IMPORT, f"{own} is new: say in MAY_IMPORT what it may import"
    used = {name.split(".")[1] for name in imports(path) if name.startswith("tinylm.")}
    assert used <= MAY_IMPORT[own] | {own}
    assert "tinylm" not in set(imports(path)), "import the part, not the package"


def test_the_rule_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        free = {name for name, needs in MAY_IMPORT.items() if needs <= done} - done
        assert free, f"a circle among {set(MAY_IMPORT) - done}"
        done |= free


def test_the_checker_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    file = tmp_path / "ops" / "x.py"
    file.write_text(
        "import tinylm.a\nfrom tinylm import b\nfrom tinylm.c import d\nfrom .. import e\nfrom ..f import g\n"
        "from . import h\ndef late():\n    import tinylm.i\nif TYPE_CHECKING:\n    import tinylm.j\n"
    )
    named = {name for name in imports(file) if name.startswith("tinylm.")}
    assert named == {"tinylm.a", "tinylm.b", "tinylm.c", "tinylm.e", "tinylm.f", "tinylm.ops", "tinylm.i"}


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


OPTIONAL = [
    "cuda", "matplotlib", "ninja", "pandas", "psutil", "pynvml", "pytest", "rich", "safetensors", "scipy",
    "seaborn", "tokenizers", "transformers", "triton", "typer", "tyro", "torch._dynamo", "torch._inductor",
    "torch.utils.cpp_extension",
]  # fmt: skip


@pytest.mark.parametrize(("module", "absent"), [("tinylm", ["torch", *OPTIONAL]), ("tinylm.bench", ["torch"])])
def test_import_does_not_even_load_torch(module: str, absent: list[str]) -> None:
    assert fresh(f"import sys, {module}; print(sorted(set(sys.modules) & set({absent})))").strip() == "[]"


def test_every_public_name_loads_without_cuda_compilers_and_options() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import tinylm, tinylm.ops, tinylm.cache, tinylm.attention
from tinylm import PRESETS, ConfigError, ModelConfig, RopeScaling, Transformer, preset
from tinylm import Decoder, Sampling
import tinylm.data, tinylm.tokenizer
Transformer.build(preset("nano"))
print(torch.cuda.is_initialized(), sorted((set(sys.modules) - before) & set({OPTIONAL})))
"""
    assert fresh(code).split() == ["False", "[]"]


def test_an_unknown_name_is_the_usual_error() -> None:
    import tinylm

    with pytest.raises(AttributeError, match="nosuch"):
        tinylm.nosuch  # noqa: B018


def test_no_public_name_is_also_a_module() -> None:
    """Such a name would be the function or the module, depending on what was imported before."""
    import tinylm

    assert not {name for names in tinylm._HOMES.values() for name in names} & {part(path) for path in modules()}
