"""The journal of a run: every cell that starts and every cell that is finished, one JSON line each, on disk at once.

pytest-benchmark writes its JSON when the run ends. The journal beside it, `<stem>.journal.jsonl`, holds all that the
JSON needs, so that whatever ends the run leaves every finished cell: to be taken over by `--resume`, or made into
JSON by `tinylm-bench recover`. Its lines:

    {"journal": 1, ...}          a process begins: machine, commit, label, arguments; one more for each that resumes
    {"start": <node id>, ...}    a cell is about to be measured; if it is not finished, the process died there
    {"fullname": <node id>, ...} a finished cell: its outcome, samples, extra_info, wall time
    {"end": <time>, ...}         the process ended in order, and its JSON is on disk
"""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tinylm.bench import results
from tinylm.bench.results import BrokenFile

Cell = dict[str, Any]

# The run's `record.Record`, for what measures several cells at once: `settled(item)` says why a cell is not to be
# measured, `start(item)` writes down that it is about to be.
RECORD = pytest.StashKey[Any]()
# The run's `profiling.Profiling`, where it takes profiles instead of timings.
PROFILING = pytest.StashKey[Any]()

SUFFIX = ".journal.jsonl"
UNFINISHED = "the run ended while it was measured"
# What a cell has in the JSON's lists of skipped and failed cells; the journal tells more.
LISTED = ("fullname", "name", "group", "params", "reason", "extra_info")


def beside(json_path: Path) -> Path:
    """The journal of a JSON file."""
    return json_path.with_name(json_path.stem + SUFFIX)


def json_path(config: pytest.Config) -> Path | None:
    """The file that `--benchmark-json` names."""
    given = config.getoption("benchmark_json", None)
    # Before pytest-benchmark 5.3 this is an open file.
    return given if given is None or isinstance(given, Path) else Path(given.name)


def check_writable(json_path: Path) -> None:
    """Raises ValueError if this file, and its journal, cannot be written."""
    if json_path.is_dir():
        raise ValueError(f"--benchmark-json {json_path}: is a folder, expected a file")
    there = json_path if json_path.exists() else json_path.absolute().parent
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK) or not (there.is_dir() or there == json_path):
        raise ValueError(f"--benchmark-json {json_path}: {there} cannot be written: name another")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()


def append(path: Path, *entries: Mapping[str, Any], durable: bool = True) -> None:
    """One line each, in the file when this returns. What a killed process left of a line stays a line of its own.

    durable: on disk too a moment later, so that they outlive the system and not only the process; a disk takes 5 to
    50 ms for it, which nobody waits for.
    """
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(_lines(entries))
        file.flush()
        if durable:
            threading.Thread(target=_sync, args=(os.dup(file.fileno()),)).start()


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    finally:
        os.close(file)


def create(path: Path, *entries: Mapping[str, Any]) -> None:
    """A new journal that begins with these lines: all of them are there, or whatever was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("wb") as file:
        file.write(_lines(entries))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def unended(path: Path) -> Path | None:
    """Where a journal is kept that a new run would replace, if its own run did not come to its end."""
    try:
        complete = read(path).complete
    except BrokenFile:
        complete = True
    return None if complete else path.with_name(path.name.removesuffix(SUFFIX) + ".old" + SUFFIX)


def _lines(entries: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(entry, default=str) + "\n" for entry in entries).encode()


@dataclass
class History:
    """What a journal, or a JSON file, tells of the run so far."""

    path: Path  # the file that told it
    header: dict[str, Any]  # of the process that wrote last
    cells: dict[str, Cell] = field(default_factory=dict)  # finished, by node id; the last outcome counts
    running: dict[str, Any] | None = None  # the start of a cell that is not finished
    ended: dict[str, Any] | None = None  # the line by which the last process ended in order
    latest: int = 0  # how many cells the last process finished
    null_reasons: dict[str, str] = field(default_factory=dict)  # why readings are null, by name

    @property
    def complete(self) -> bool:
        """Whether the run came to its end, perhaps with failed cells."""
        return self.ended is not None and self.ended.get("status") in (0, 1)

    def having(self, outcome: str) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.get("outcome") == outcome]


def load(path: Path) -> History:
    """The history in a JSON file or a journal. Raises BrokenFile, in one line, if it has none.

    A JSON file's journal comes first where it is still there: it has all that the JSON has, and it alone knows of a
    run that has not written its JSON yet, or was killed while it did.
    """
    if path.name.endswith(SUFFIX):
        return read(path)
    if beside(path).exists():
        return read(beside(path))
    document = results.load(path)
    header = {key: document.get(key) or {} for key in ("machine_info", "commit_info")}
    header |= {"started": document.get("datetime"), "pytest_benchmark": document.get("version")}
    found = History(path, header | {"label": header["machine_info"].get("label")})
    found.null_reasons = document.get("null_reasons") or {}
    for section, outcome in (("benchmarks", "measured"), ("skipped", "skipped"), ("failed", "failed")):
        for cell in document.get(section) or []:
            data = (cell.get("stats") or {}).get("data")
            if cell.get("fullname") and (data or section != "benchmarks"):  # a saved run may have left its samples out
                cell = {key: value for key, value in cell.items() if key not in ("stats", "options")}
                found.cells[cell["fullname"]] = cell | {"outcome": outcome} | ({"data": data} if data else {})
    return found


def read(path: Path) -> History:
    """The history in a journal. A line that a killed process left unfinished is passed over. Raises BrokenFile."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BrokenFile(f"{path}: cannot be read ({error.strerror})") from None
    found: History | None = None
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict):
            continue
        if "journal" in entry:
            if entry["journal"] != 1:
                raise BrokenFile(f"{path}: a journal of version {entry['journal']}, expected 1: use a newer tinylm")
            found = found or History(path, entry)
            found.header, found.running, found.ended, found.latest = entry, None, None, 0
            if entry.get("retry"):
                found.cells = {cell["fullname"]: cell for cell in found.having("measured")}
        elif found is None:
            break
        elif "start" in entry:
            found.running = entry
        elif "fullname" in entry:
            found.cells.pop(entry["fullname"], None)  # in the order of finishing
            found.cells[entry["fullname"]] = entry
            found.null_reasons |= entry.get("null_reasons") or {}
            found.latest += 1
            found.running = None
        elif "end" in entry:
            found.ended = entry
    if found is None:
        raise BrokenFile(f"{path}: not a journal (its first line is no header); give a *{SUFFIX} of a run")
    return found


def lost(start: Mapping[str, Any], reason: str, **extra_info: Any) -> Cell:
    """The record of a cell of which only the start is known."""
    known = {key: start.get(key) for key in ("name", "group", "params")}
    return {"fullname": start["start"], **known, "outcome": "failed", "reason": reason, "extra_info": extra_info}


def listed(cells: Iterable[Cell], outcome: str) -> list[Cell]:
    """The JSON's list of the cells with this outcome."""
    return [{key: cell.get(key) for key in LISTED} for cell in cells if cell["outcome"] == outcome]


def benchmark(cell: Cell) -> dict[str, Any]:
    """A measured cell as pytest-benchmark writes it."""
    from pytest_benchmark.stats import Stats

    stats = Stats()
    for sample in cell["data"]:
        stats.update(sample)
    return {
        **{key: cell.get(key) for key in ("group", "name", "fullname", "params", "param", "extra_info")},
        "options": {"timer": "replayed_samples"},
        "stats": stats.as_dict() | {"data": stats.data, "iterations": 1},
    }


def document(history: History) -> dict[str, Any]:
    """What pytest-benchmark would have written, had the run ended with the cells that the journal has."""
    cells = list(history.cells.values())
    if history.running is not None:
        cells.append(lost(history.running, UNFINISHED))
    measured = [cell for cell in cells if cell["outcome"] == "measured" and cell.get("data")]
    return {
        "machine_info": history.header.get("machine_info") or {},
        "commit_info": history.header.get("commit_info") or {},
        "benchmarks": [benchmark(cell) for cell in measured],
        "datetime": next((cell["at"] for cell in reversed(cells) if cell.get("at")), history.header.get("started")),
        "version": history.header.get("pytest_benchmark"),
        "skipped": listed(cells, "skipped"),
        "failed": listed(cells, "failed"),
        "null_reasons": history.null_reasons,
    }
