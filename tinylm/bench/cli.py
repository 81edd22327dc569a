"""The command `tinylm-bench`: run the suite; merge, draw, report, compare and label its files; look at the machine.

Exit status: 0; 1 where a JSON file was broken (the others were processed), where `compare` found what
`--fail-on` names, or pytest's own for `run`; 2 for bad input, told in one line.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from tinylm.bench import compare as comparison
from tinylm.bench import compare_text, launch, results, supervisor, telemetry, training_logs
from tinylm.bench import journal as journals
from tinylm.bench.plan import RUNGS
from tinylm.bench.results import PLOTS, TABLES, BadInput, BrokenFile, Row

RESULTS = Path("results")
SITE = Path("site")


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
    return rows, _told(broken)


def _read_with_logs(inputs: list[str] | None) -> tuple[list[Row], bool]:
    """The same, and the rows of training logs."""
    logs, broken = training_logs.read(inputs or [RESULTS])
    rows, also = results.read(inputs or [RESULTS], required=not (logs or broken))
    return rows + logs, _told(broken + also)


def _told(broken: list[str]) -> bool:
    for line in broken:
        typer.echo(line, err=True)
    return bool(broken)


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
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="JSON files, training logs, folders of them or quoted patterns [default: results]"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the pictures")] = RESULTS / PLOTS,
    only: Annotated[list[str] | None, typer.Option(help="draw this plot only (may be repeated)")] = None,
) -> None:
    """Draw every plot as PNG and SVG, one series per label, each with a CSV of the numbers that it shows."""
    rows, broken = _read_with_logs(inputs)
    _plot(rows, out, only or [])
    raise typer.Exit(int(broken))


def _plot(rows: list[Row], out: Path, only: list[str]) -> None:
    from tinylm.bench import plots  # pandas and seaborn take seconds to import

    if unknown := [name for name in only if name not in plots.PLOTS]:
        raise BadInput(f"--only {unknown[0]}: no such plot; expected one of {', '.join(plots.PLOTS)}")
    for name, paths, reason in plots.save(results.frame(results.current(rows)), out, only):
        typer.echo(
            f"{paths[-1]} (and {', '.join(path.suffix for path in paths[:-1])})" if paths else f"{name}: {reason}"
        )


@app.command()
def report(
    inputs: Inputs = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the page")] = SITE,
) -> None:
    """Write one page of everything, for a browser: pictures, charts, tables, commands. It needs no network."""
    from tinylm.bench import report as pages  # pandas, seaborn and plotly take seconds to import

    path, broken = pages.write(inputs or [RESULTS], out)
    for line in broken:
        typer.echo(line, err=True)
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    raise typer.Exit(int(bool(broken)))


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="file, folder of runs or quoted pattern")],
    new: Annotated[list[str], typer.Argument(help="the same; several are each compared with BASE")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="time, tokens, memory, energy, ceiling or a column; may be repeated [default: time]"),
    ] = None,
    threshold: Annotated[str, typer.Option(help="smallest change of interest: 2% or 0.02")] = "2%",
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="status 1 for cells slower, faster, less, more, any-change, inconclusive or missing"),
    ] = None,
    changed: Annotated[bool, typer.Option("--changed", help="show only cells that changed")] = False,
    csv: Annotated[Path | None, typer.Option(help="write all comparisons to this file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write what is shown to this file")] = None,
) -> None:
    """Compare runs cell by cell: ratio, 95% interval and verdict, with the run as the unit."""
    share, sides, broken = comparison.fraction(threshold), [], False
    for name in (base, *dict.fromkeys(new)):
        rows, also_broken = _read([name])
        sides.append(comparison.side(name, rows))
        broken |= also_broken
    before, *after = sides
    columns = [comparison.column(word, sides) for word in comparison.split(metric or ["time"])]
    words = comparison.fail_words(fail_on or [], columns)
    found = comparison.compare(before, after, columns, share)
    narrow = sys.stdout.isatty() and Console().width < 110
    header = compare_text.NARROW if narrow else compare_text.HEADER
    pages = []
    for title, cells, said in compare_text.tables(before, after, columns, found, share):
        shown = compare_text.changed(cells) if changed else cells
        pages.append(compare_text.markdown(shown, title, said))
        typer.echo(title)
        if shown:
            _table(header, compare_text.lines(shown, narrow), wrap_only_first=True)
        typer.echo("\n".join([*said, ""]))
    if csv:
        results.write_atomically(csv, compare_text.csv_text(found))
    if markdown:
        results.write_atomically(markdown, "\n".join(pages))
    failed = False
    if words:
        missing = sum(comparison.missing(before, side, column) for side in after for column in columns)
        failed, line = comparison.failing(found, missing, words)
        typer.echo(line, err=True)
    raise typer.Exit(int(broken or failed))


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]], wrap_only_first: bool = False) -> None:
    # Not a terminal: wide enough that no field is cut off.
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False)
    table = Table(*header, box=None, pad_edge=False)
    for i, column in enumerate(table.columns):
        column.overflow = "fold"
        column.no_wrap = wrap_only_first and i > 0
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
def calibrate(
    folder: Annotated[Path, typer.Option("--results", help="where results go")] = RESULTS,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    gpu_label: Annotated[str | None, typer.Option(help="label [default: from the device's name]")] = None,
    only: Annotated[list[str] | None, typer.Option(help="modes, repeatability, pairs or energy (repeatable)")] = None,
    processes: Annotated[int, typer.Option(min=2, help="fresh processes to compare")] = 10,
    pairs: Annotated[int, typer.Option(min=1, help="pairs of identical code; a fifth as many of slower")] = 1000,
    threshold: Annotated[str | None, typer.Option(help="of the pairs' verdicts [default: 0.5%; CPU: 3%]")] = None,
) -> None:
    """Measure how far the figures of this machine can be trusted, against Nsight Compute where it is found."""
    from tinylm.bench import calibrate as calibration

    if unknown := [name for name in only or [] if name not in calibration.SECTIONS]:
        raise BadInput(f"--only {unknown[0]}: expected some of {', '.join(calibration.SECTIONS)}")
    share = None if threshold is None else comparison.fraction(threshold)
    _facts(device)  # refuses a device that is none
    on = calibration.machine(device, gpu_label)
    path = folder / results.check_label(on.label) / results.CALIBRATION
    calibration.run(on, path, tuple(only or calibration.SECTIONS), processes, pairs, share, typer.echo)
    typer.echo(path)


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
    resume: Annotated[Path | None, typer.Option(help="take over the finished cells of this JSON or journal")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="of these, only the measured ones")] = False,
) -> None:
    """Run the benchmarks, then merge and plot all results. Other arguments (paths, -k, ...) go to pytest."""
    extra = list(ctx.args)
    if any(argument.startswith("--benchmark-json") for argument in extra):
        raise BadInput("--benchmark-json: `run` names the file itself; use --results, or pytest directly")
    if any(argument.startswith("--profile") for argument in extra):
        raise BadInput("--profile: `run` keeps timings; for profiles use pytest directly, with -k to choose cells")
    if preset_size is not None and preset_size not in RUNGS:
        raise BadInput(f"--preset-size {preset_size!r}: expected one of {', '.join(RUNGS)}")
    label = _label(_facts(device), gpu_label)
    options = [
        f"--gpu-label={label}",
        *([f"--device={device}"] if device != "auto" else []),  # the suite may have such an option itself
        *([f"--preset-size={preset_size}"] if preset_size else []),
        *([f"--resume={resume}"] if resume else []),
        *(["--retry"] if retry else []),
    ]
    paths = [] if launch.has_paths(extra) else ["benchmarks"]
    if paths and not Path("benchmarks").is_dir():
        raise BadInput(
            f"{Path.cwd()}: no folder benchmarks here; start in a checkout of tinylm, or name your benchmarks"
        )
    partial, final = launch.place(folder / label / results.check_label(suite), resume)
    command = [sys.executable, "-m", "pytest", *paths, f"--benchmark-json={partial}", *options, *extra]
    status = supervisor.supervise(command, journals.beside(partial))
    if status == pytest.ExitCode.USAGE_ERROR:  # pytest said why
        launch.left(partial)
        raise typer.Exit(2)
    if trouble := launch.complete(status, partial):
        typer.echo(f"tinylm-bench run: no results: {trouble}{launch.left(partial)}", err=True)
        raise typer.Exit(status or 1)
    os.replace(partial, final)
    shutil.rmtree(partial.parent)  # the journal: all of it is in the file
    typer.echo(f"\n{final}")
    rows, broken = _read([str(folder)])
    _merge(rows, folder / TABLES)
    logs, broken_logs = training_logs.read([folder])
    _plot(rows + logs, folder / PLOTS, [])
    raise typer.Exit(status or int(_told(broken_logs) or broken))


@app.command()
def recover(
    journal: Annotated[
        Path, typer.Argument(help=f"*{journals.SUFFIX}, beside the JSON that the run would have written")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file [default: beside the journal]")] = None,
) -> None:
    """Make pytest-benchmark JSON from the journal of a run that did not end."""
    history = journals.read(journal)
    path = out or journal.with_name(journal.name.removesuffix(journals.SUFFIX) + ".json")
    if out is None and launch.sound(path):
        raise BadInput(f"{path}: is there already; name another file with -o")
    launch.write(history, path)
    counts = ", ".join(f"{len(history.having(outcome))} {outcome}" for outcome in ("measured", "skipped", "failed"))
    unfinished = f"; {history.running['start']}: {journals.UNFINISHED}" if history.running else ""
    typer.echo(f"{path}: {counts}{unfinished}")
