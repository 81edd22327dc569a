"""pytest-benchmark JSON files to tidy rows, one for each cell of each run, and to one CSV per experiment.

A cell is *measured*, *skipped* or *failed*. Plain pytest-benchmark JSON, without the keys of our plugin,
gives the same rows with fewer columns. Times are in seconds, as pytest-benchmark stores them; other units
are in the keys.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinylm.bench import footprint

Row = dict[str, Any]  # a key that is absent does not apply; None: the machine could not tell

IDENTITY = ("label", "suite", "run", "experiment", "outcome", "reason", "group", "name", "fullname")
PARAMS = (
    "op",
    "impl",
    "dtype",
    "direction",
    "phase",
    "preset",
    "batch",
    "context",
    "cache",
    "hidden",
    "rows",
)
STATS = ("median", "min", "max", "mean", "stddev", "q1", "q3", "iqr", "rounds")  # seconds, rounds a count
EXTRA = (
    *("bytes", "flops", "tokens", "bytes_per_s", "flops_per_s", "tokens_per_s", "ceiling_bytes_per_s"),
    *("ceiling_read_bytes_per_s", "ceiling_flops_per_s", "of_ceiling", "timing", "stop_reason", "ci_width", "blocks"),
    *("block_samples", "versus", "ratio", "ratio_low", "ratio_high", "verdict"),
    *("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "predicted_bytes", "out_of_memory"),
    *footprint.PARTS,
    *("energy_j", "energy_per_token_j", "energy_window_s", "power_w", "sm_clock_hz", "sm_clock_low_hz"),
    *("temperature_c", "throttle", "flagged_blocks", "error", "sdpa_backend", "decoded_tokens", "mean_context"),
)
ORIGIN = ("device_name", "device_memory_bytes", "torch", "datetime", "commit", "commit_dirty")
UNLABELLED = "unlabelled"
# Folders of results/ that hold what is made from the runs.
TABLES, PLOTS = "tables", "plots"
TRAINING_LOG = "log.csv"  # what makes a folder that of a training run, wherever it is
CALIBRATION = "calibration.json"  # in a label's folder: what `tinylm-bench calibrate` found; no run


class BadInput(ValueError):
    """What the user gave cannot be used; one line: what was given, what was expected, what to do."""


class BrokenFile(ValueError):
    """A file that is not pytest-benchmark JSON; the message names it."""


def check_label(name: str) -> str:
    """`name` if it can name a folder of results/; raises BadInput if not."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in (TABLES, PLOTS):
        raise BadInput(
            f"label {name!r}: expected letters, digits, '.', '_' and '-', starting with a letter or digit, "
            f"and not {TABLES!r} or {PLOTS!r}, because it names a folder of the results"
        )
    return name


def find(inputs: Iterable[str | Path], *, required: bool = True) -> dict[Path, Path]:
    """The JSON files that `inputs` (files, folders, glob patterns) name, each once -> the input it is from.

    Calibrations, CSV files and the checkpoints of a training run are left out. Raises BadInput for an input that does
    not exist, and, if `required`, where no file is found at all.
    """
    given = [str(name) for name in inputs]
    found = {
        file: source
        for file, source in files(given, ".json").items()
        if file.suffix != ".csv" and (file == source or not (calibration(file) or _of_training(file, source)))
    }
    if required and not found:
        raise BadInput(
            f"{', '.join(given)}: no JSON files there (nor, for `plot`, rows of training logs); make some with "
            "`tinylm-bench run` or `pytest benchmarks --benchmark-json=FILE`"
        )
    return found


def files(inputs: Iterable[str | Path], suffix: str) -> dict[Path, Path]:
    """The files that `inputs` name, and those of `suffix` in the folders that they name, each once -> its input.

    Hidden files and folders inside a folder are left out: runs in progress are there. Raises BadInput for
    an input that does not exist.
    """
    found: dict[Path, Path] = {}
    for path in _named(map(str, inputs)):
        for file in _inside(path, f"*{suffix}") if path.is_dir() else [path]:
            found.setdefault(file, path)
    unique = {file.resolve(): file for file in reversed(found)}
    return {file: found[file] for file in sorted(unique.values(), key=lambda file: file.as_posix())}


def _named(inputs: Iterable[str]) -> Iterator[Path]:
    """The files and folders that exist under these names and patterns. Raises BadInput where there are none."""
    for given in inputs:
        for text in [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True)) or [given]:
            if not os.path.exists(text):
                raise BadInput(f"{given}: no such file or folder; give pytest-benchmark JSON files or folders of them")
            yield Path(text)


def _inside(folder: Path, pattern: str) -> Iterator[Path]:
    for file in sorted(folder.rglob(pattern)):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts) and file.is_file():
            yield file


def _of_training(file: Path, source: Path) -> bool:
    """A file in the folder of a training run, below `source`, or in a folder inside it."""
    inner = len(file.relative_to(source).parts)
    return any((folder / TRAINING_LOG).is_file() for folder in file.parents[:inner])


def calibration(file: Path) -> dict[str, Any] | None:
    """What `tinylm-bench calibrate` wrote, if this file is such a one."""
    if file.name != CALIBRATION:
        return None
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and "calibration" in document else None


def calibrations(inputs: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Label -> the calibration in the folders that `inputs` name."""
    found = {}
    for folder in _named(map(str, inputs)):
        for file in _inside(folder, CALIBRATION) if folder.is_dir() else ():
            if document := calibration(file):
                found[str(document.get("label") or file.absolute().parent.name)] = document
    return found


def load(path: Path) -> dict[str, Any]:
    """One file's document. Raises BrokenFile if it is not pytest-benchmark JSON."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise BrokenFile(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path}: not valid JSON ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict) or not isinstance(document.get("benchmarks"), list):
        raise BrokenFile(f"{path}: not pytest-benchmark JSON (it has no list 'benchmarks')")
    for section in ("benchmarks", "skipped", "failed"):
        for cell in document.get(section) or []:
            if not isinstance(cell, dict) or not isinstance(cell.get("name"), str):
                raise BrokenFile(f"{path}: not pytest-benchmark JSON (an entry of {section!r} has no name)")
    return document


def read(inputs: Iterable[str | Path], *, required: bool = True) -> tuple[list[Row], list[str]]:
    """All rows of all files that `inputs` name, and one line for each broken file; BadInput as `find`."""
    runs, broken = documents(inputs, required=required)
    return [row for run, document in runs for row in rows_of(document, run)], broken


def documents(
    inputs: Iterable[str | Path], *, required: bool = True
) -> tuple[list[tuple[Row, dict[str, Any]]], list[str]]:
    """Each file's label, suite and run, with its document; and one line for each broken file."""
    runs: list[tuple[Path, tuple[str, str, str], dict[str, Any]]] = []
    broken = []
    for file, source in find(inputs, required=required).items():
        try:
            document = load(file)
        except BrokenFile as error:
            broken.append(str(error))
            continue
        label, suite = layout(file, source)
        named = _mapping(document.get("machine_info")).get("label")
        runs.append((file, (str(named) if named else label, suite, file.stem), document))
    keys = [key for _, key, _ in runs]
    found = []
    for file, (label, suite, run), document in runs:
        if keys.count((label, suite, run)) > 1:  # the same name in folders that are not results/<label>/<suite>/
            run = file.with_suffix("").as_posix()
        found.append(({"label": label, "suite": suite, "run": run}, document))
    return found, broken


def layout(file: Path, source: Path) -> tuple[str, str]:
    """Label and suite from results/<label>/<suite>/<run>.json; `source`, where the file was found, may be results/."""
    parts = file.absolute().parts
    inside = file.relative_to(source).parts if source != file else ()
    if len(inside) == 3 or (len(parts) > 3 and parts[-4] == "results"):
        return parts[-3], parts[-2]
    return UNLABELLED, ""


def rows_of(document: dict[str, Any], run: Row) -> list[Row]:
    """A row for each cell of one document."""
    machine, commit = _mapping(document.get("machine_info")), _mapping(document.get("commit_info"))
    device = _mapping(machine.get("device"))
    origin = {
        "device_name": device.get("name"),
        "device_memory_bytes": device.get("memory_bytes"),
        "torch": device.get("torch"),
        "datetime": document.get("datetime"),
        "commit": commit.get("id"),
        "commit_dirty": commit.get("dirty"),
    }
    origin = {key: value for key, value in origin.items() if value is not None}
    rows = []
    for section in ("benchmarks", "skipped", "failed"):
        for cell in document.get(section) or []:
            stats = {key: value for key, value in _mapping(cell.get("stats")).items() if key in STATS}
            outcome, reason = ("measured" if section == "benchmarks" else section), cell.get("reason")
            if section == "benchmarks" and not stats:
                outcome, reason = "failed", "no statistics in the file"
            row = run | {"experiment": experiment(cell), "outcome": outcome, "name": cell["name"]}
            row |= {"reason": " ".join(str(reason).split())} if reason else {}
            row |= {key: cell[key] for key in ("group", "fullname") if cell.get(key)}
            row |= _renamed(_mapping(cell.get("params")), "param", {*IDENTITY, *STATS, *ORIGIN})
            row |= _renamed(_mapping(cell.get("extra_info")), "extra", {*IDENTITY, *STATS, *ORIGIN, *row})
            rows.append(row | stats | origin)
    return rows


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _renamed(values: Mapping[str, Any], prefix: str, taken: set[str]) -> Row:
    """`values` under names that no other column has: a parameter called `run` becomes `param_run`."""
    return {f"{prefix}_{key}" if key in taken else key: _flat(value) for key, value in values.items()}


def _flat(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def experiment(cell: Mapping[str, Any]) -> str:
    """`benchmarks/bench_rmsnorm.py::test_rmsnorm[...]` -> `rmsnorm`; always fit for a file name."""
    file = re.split(r"[\\/]", str(cell.get("fullname") or "").split("::")[0])[-1]
    stem = re.sub(r"[^\w.-]", "_", file.removesuffix(".py").removeprefix("bench_")).strip(".")
    return stem or "unknown"


def columns(rows: Iterable[Row]) -> list[str]:
    """The columns of a table, in an order that no file's order changes: known ones first, then by name."""
    found = {key for row in rows for key in row}
    known = [*IDENTITY, *PARAMS, *STATS, *EXTRA, *ORIGIN]
    extra = len(known) - len(ORIGIN)
    ordered = [*known[:extra], *sorted(found.difference(known)), *known[extra:]]
    always = {*IDENTITY, *STATS, *ORIGIN}
    return [key for key in ordered if key in found or key in always]


def csv_text(rows: Sequence[Row], keys: Sequence[str] | None = None) -> str:
    """CSV whose numbers read back exactly. Empty: does not apply; `null`: the machine could not tell."""
    keys = columns(rows) if keys is None else keys
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(keys)
    writer.writerows([_field(row[key]) if key in row else "" for key in keys] for row in rows)
    return out.getvalue()


def _field(value: Any) -> str:
    # JSON's own words for None and booleans; repr is the shortest text that gives a float back.
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def frame(rows: Sequence[Row]) -> Any:
    """The rows as a pandas DataFrame, with the columns of `columns(rows)`."""
    import pandas

    return pandas.DataFrame.from_records(rows, columns=columns(rows))


def current(rows: Sequence[Row]) -> list[Row]:
    """Without what an older way of measuring gave of an experiment, where its label has it by the present one too.

    Samples come in blocks since kernels are timed by stamps of the device's timer: events added about 2 us to each.
    """

    def group(row: Row) -> tuple[str, str]:
        return row["label"], row["experiment"]

    present = {group(row) for row in rows if row.get("blocks")}
    return [row for row in rows if row.get("blocks") or _timeless(row) or group(row) not in present]


def _timeless(row: Row) -> bool:
    """A cell that was not measured, or not by us."""
    return row["outcome"] != "measured" or "stop_reason" not in row or row["stop_reason"] == "given"


def write_tables(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One CSV per experiment in `folder`; gives the paths written."""
    written = []
    for name in sorted({row["experiment"] for row in rows}):
        path = folder / f"{name}.csv"
        write_atomically(path, csv_text([row for row in rows if row["experiment"] == name]))
        written.append(path)
    return written


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, in a folder that may be missing. Raises BadInput if it cannot."""
    path = Path(os.path.realpath(path))  # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); choose another place") from None
    finally:
        with contextlib.suppress(OSError):  # gone already, or never made
            temporary.unlink()


def set_label(path: Path, label: str) -> None:
    """Put `label` into a file's machine_info, for JSON that was made without our plugin."""
    document = load(path)
    document["machine_info"] = _mapping(document.get("machine_info")) | {"label": check_label(label)}
    write_atomically(path, json.dumps(document, indent=4) + "\n")
