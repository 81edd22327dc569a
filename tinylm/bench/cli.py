"""The command `tinylm-bench`: run the suite; merge, draw, compare and label its files; look at the machine.

Exit status: 0; 1 where a JSON file was broken (the others were processed), or pytest's own for `run`; 2 for
bad input, told in one line.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from tinylm.bench import compare as comparison
from tinylm.bench import results, telemetry
from tinylm.bench.plan import RUNGS
from tinylm.bench.results import PLOTS, TABLES, BadInput, BrokenFile, Row

RESULTS = Path("results")
# pytest's short options that take a value: what follows them is no path.
VALUED = ("-k", "-m", "-p", "-c", "-o", "-W", "-r", "-n")


class _OneLine(TyperGroup):
    """Bad input ends a command with one line on stderr and exit status 2, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (BadInput, BrokenFile, telemetry.MachineError) as error:
            typer.echo(f"tinylm-bench {ctx.invoked_subcommand}: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_OneLine,
    help="Run the benchmarks of language-model engineering; merge, draw and compare their results.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Inputs = Annotated[
    list[str] | None, typer.Argument(help="JSON files, folders of them or quoted patterns [default: results]")
]


def _read(inputs: list[str] | None) -> tuple[list[Row], bool]:
    """The rows, and whether a file was broken; broken files are named on stderr."""
    rows, broken = results.read(inputs or [RESULTS])
    for line in broken:
        typer.echo(line, err=True)
    return rows, bool(broken)


@app.command()
def merge(
    inputs: Inputs = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the tables")] = RESULTS / TABLES,
) -> None:
    """Merge any number of JSON files into one tidy CSV per experiment: a row for each cell of each run."""
    rows, broken = _read(inputs)
    _merge(rows, out)
    raise typer.Exit(int(broken))


def _merge(rows: list[Row], out: Path) -> None:
    for path in results.write_tables(rows, out):
        typer.echo(path)


@app.command()
def plot(
    inputs: Inputs = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the pictures")] = RESULTS / PLOTS,
    only: Annotated[list[str] | None, typer.Option(help="draw this plot only (may be repeated)")] = None,
) -> None:
    """Draw every plot as PNG and SVG, one series per label, each with a CSV of the numbers that it shows."""
    rows, broken = _read(inputs)
    _plot(rows, out, only or [])
    raise typer.Exit(int(broken))


def _plot(rows: list[Row], out: Path, only: list[str]) -> None:
    from tinylm.bench import plots  # pandas and seaborn take seconds to import

    if unknown := [name for name in only if name not in plots.PLOTS]:
        raise BadInput(f"--only {unknown[0]}: no such plot; expected one of {', '.join(plots.PLOTS)}")
    for name, paths, reason in plots.save(results.frame(rows), out, only):
        typer.echo(
            f"{paths[-1]} (and {', '.join(path.suffix for path in paths[:-1])})" if paths else f"{name}: {reason}"
        )


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="file, folder of runs or quoted pattern")],
    new: Annotated[list[str], typer.Argument(help="the same; several are each compared with BASE")],
    metric: Annotated[str, typer.Option(help="a column of the tables")] = "median",
    threshold: Annotated[float, typer.Option(min=0, help="smallest change of interest: 0.02 is 2%")] = 0.0,
    csv: Annotated[Path | None, typer.Option(help="write the comparisons to this file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write them as a Markdown table")] = None,
) -> None:
    """Compare runs cell by cell: ratio and 95% interval, with the run as the unit."""
    (rows, broken), found, pages = _read([base]), [], []
    before = comparison.side(base, rows)
    for name in new:
        rows, also_broken = _read([name])
        broken |= also_broken
        after = comparison.side(name, rows)
        pairs = comparison.compare(before, after, metric, threshold)
        summary = comparison.summary(before, after, pairs, metric)
        found += pairs
        pages.append(comparison.markdown(pairs, f"{base} and {name}: {summary}"))
        _table(comparison.HEADER, comparison.lines(pairs), f"{base} → {name}")
        typer.echo(summary)
    if csv:
        results.write_atomically(csv, comparison.csv_text(found))
    if markdown:
        results.write_atomically(markdown, "\n".join(pages))
    raise typer.Exit(int(broken))


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]], title: str = "") -> None:
    # Not a terminal: wide enough that no field is cut off.
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False)
    table = Table(*header, title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for line in lines:
        table.add_row(*line)
    console.print(table)


@app.command()
def label(
    files: Annotated[list[Path] | None, typer.Argument(help="JSON files")] = None,
    name: Annotated[str | None, typer.Option("--set", help="label these files so")] = None,
    gpu_label: Annotated[str | None, typer.Option(help="instead of the name of the device")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
) -> None:
    """Print this machine's label, or that of files; with --set, write one into plain files."""
    if not files:
        if name is not None:
            raise BadInput(f"--set {name}: no files given; name the JSON files to label")
        typer.echo(_label(_facts(device), gpu_label))
        return
    if name is not None:
        results.check_label(name)
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file}: no such file; give pytest-benchmark JSON files")
        if name is not None:
            results.set_label(file, name)
    for row in {row["run"]: row for row in results.read(files)[0]}.values():
        typer.echo(f"{row['run']}: {row['label']}")


def _facts(device: str) -> dict[str, Any]:
    if device not in ("auto", "cuda", "cpu"):
        raise BadInput(f"--device {device}: expected auto, cuda or cpu")
    return telemetry.device_facts(telemetry.resolve_device(device))


def _label(facts: dict[str, Any], given: str | None) -> str:
    return results.check_label(telemetry.label(facts, given))


@app.command()
def doctor() -> None:
    """Print what the machine has, which backends can run, and what to install for the others."""
    lines: list[tuple[str, ...]] = [("python", platform.python_version()), ("system", platform.platform())]
    for package in ("tinylm", "torch", "pytest", "pytest-benchmark", "nvidia-ml-py"):
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    checks: list[tuple[str, bool, str, str]] = []
    try:
        facts = _facts("auto")
        lines += [(key, str(value)) for key, value in facts.items() if value is not None and key != "torch"]
        lines.append(("label", _label(facts, None)))
    except telemetry.MachineError as error:
        checks.append(("device", False, str(error), "as it says"))
    _table(("machine", ""), lines)
    typer.echo("")
    for entry in importlib.metadata.entry_points(group="tinylm.doctor"):
        try:
            checks += entry.load()()
        except Exception as error:  # a broken backend package must not hide the others
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            checks.append((entry.name, False, reason, f"repair {entry.value.partition(':')[0]}"))
    if not checks:
        checks.append(("backends", False, "no installed package offers any", "pip install -e ."))
    _table(("backend", "runs", "", "to do"), [(name, "yes" if ok else "no", *rest) for name, ok, *rest in checks])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Option("--results", help="where results go")] = RESULTS,
    suite: Annotated[str, typer.Option(help="folder of this kind of run under the label")] = "main",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    gpu_label: Annotated[str | None, typer.Option(help="label [default: from the device's name]")] = None,
    preset_size: Annotated[str | None, typer.Option(help="how large [default: from the device's memory]")] = None,
) -> None:
    """Run the benchmarks, then merge and plot all results. Other arguments (paths, -k, ...) go to pytest."""
    extra = list(ctx.args)
    if any(argument.startswith("--benchmark-json") for argument in extra):
        raise BadInput("--benchmark-json: `run` names the file itself; use --results, or pytest directly")
    if preset_size is not None and preset_size not in RUNGS:
        raise BadInput(f"--preset-size {preset_size!r}: expected one of {', '.join(RUNGS)}")
    label = _label(_facts(device), gpu_label)
    options = [
        f"--gpu-label={label}",
        f"--device={device}",
        *([f"--preset-size={preset_size}"] if preset_size else []),
    ]
    paths = [] if _has_paths(extra) else ["benchmarks"]
    if paths and not Path("benchmarks").is_dir():
        raise BadInput(
            f"{Path.cwd()}: no folder benchmarks here; start in a checkout of tinylm, or name your benchmarks"
        )
    partial, final = _claim(folder / label / results.check_label(suite))
    command = [sys.executable, "-m", "pytest", *paths, f"--benchmark-json={partial}", *options, *extra]
    status = _finish(command)
    if status == pytest.ExitCode.USAGE_ERROR:  # pytest said why
        shutil.rmtree(partial.parent)
        raise typer.Exit(2)
    if not _complete(status, partial):
        raise typer.Exit(status or 1)
    os.replace(partial, final)
    shutil.rmtree(partial.parent)  # the journal: all of it is in the file
    typer.echo(f"\n{final}")
    rows, broken = _read([str(folder)])
    _merge(rows, folder / TABLES)
    _plot(rows, folder / PLOTS, [])
    raise typer.Exit(status or int(broken))


def _has_paths(arguments: list[str]) -> bool:
    """Whether pytest's arguments say what to run: a file, folder or test id."""
    before = ["", *arguments]
    return any(
        not argument.startswith("-") and last not in VALUED and Path(argument.partition("::")[0]).exists()
        for last, argument in zip(before, arguments, strict=False)
    )


def _claim(folder: Path) -> tuple[Path, Path]:
    """Names in nobody's use: of the file while it is written, in a hidden folder, and when it is done."""
    name = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%MZ")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stem in (name, *(f"{name}-{i}" for i in range(2, 1000))):
            claimed = folder / f".{stem}.partial"
            if not (folder / f"{stem}.json").exists():
                try:
                    claimed.mkdir()
                except FileExistsError:
                    continue
                return claimed / f"{stem}.json", folder / f"{stem}.json"
    except OSError as error:
        reason = error.strerror
    else:
        reason = f"a thousand runs of {name} are there"
    raise BadInput(f"{folder}: cannot be written ({reason}); choose another folder with --results")


def _finish(command: list[str]) -> int:
    """Run to the end: an interrupt reaches pytest too, which then still writes what it has."""
    with subprocess.Popen(command) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue


def _complete(status: int, partial: Path) -> bool:
    """Whether pytest ran to its end (0 or, with failed cells, 1) and left a sound file. Says so if not."""
    try:
        if status not in (0, 1):
            raise BrokenFile(f"pytest ended with status {status}")
        if not partial.exists() or not partial.stat().st_size:
            raise BrokenFile("no benchmark was measured")
        results.load(partial)
        return True
    except BrokenFile as error:
        left = [path for path in partial.parent.iterdir() if path.stat().st_size]
        typer.echo(f"tinylm-bench run: no results: {error}" + "".join(f"; see {path}" for path in left), err=True)
        if not left:
            shutil.rmtree(partial.parent)
        return False
