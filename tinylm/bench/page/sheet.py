"""Rows of several runs to one line per label and cell, as the report's tables show them.

A value is the median over the runs that measured the cell at the commit that a label measured it at last, as a point of
a picture is. A line is for the page's JSON: numbers, texts, lists of numbers; None where a column does not apply, False
where the machine could not tell.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinylm.bench import results
from tinylm.bench.results import Row

Line = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table. kind: how a value is written and sorted. main: shown before all columns are asked for."""

    key: str
    title: str
    kind: str
    help: str = ""
    main: bool = True


# Parameters stand between `label` and these. `help` is the words of the page's legend.
COLUMNS = (
    Column("experiment", "experiment", "text"),
    Column("outcome", "outcome", "text", "measured, skipped or failed; the reason is in the last columns"),
    Column(
        "median",
        "time",
        "time",
        "of one call (of one token in decode loops): median over runs (of the newest commit) of each run's median",
    ),
    Column("span", "low – high", "span", "lowest and highest run; of a single run, the quartiles of its samples"),
    Column("runs", "runs", "count", "how many runs of that commit measured the cell"),
    Column("rounds", "samples", "count", "per run"),
    Column("tokens_per_s", "tokens/s", "tokens/s", "tokens of one call over its time"),
    Column("bytes_per_s", "bandwidth", "B/s", "bytes that must move over the time"),
    Column("flops_per_s", "arithmetic", "FLOP/s", "floating-point operations over the time"),
    Column(
        "of_ceiling", "of ceiling", "share", "the larger share, of copy bandwidth or of arithmetic, on the same card"
    ),
    Column("intensity", "FLOP/byte", "number", "operational intensity: operations over bytes", False),
    Column("error", "error", "error", "relative, against the reference; checked before timing"),
    Column("ci_width", "95 % width", "share", "full width of the median's 95 % interval over blocks, relative"),
    Column(
        "stop_reason", "stopped by", "text", "what ended sampling: width reached, seconds or samples spent, or given"
    ),
    Column("timing", "timing", "text", "cold, graph, hot or host"),
    Column("versus", "versus", "text", "what it was compared with inside the run"),
    Column("ratio", "ratio", "ratio", "own time over the other's; below 1 is faster"),
    Column(
        "ratio_span", "ratio, 95 %", "ratios", "interval of the ratio; over several runs its lowest and highest end"
    ),
    Column("verdict", "verdict", "text", "against the threshold; with counts where runs differ"),
    Column("peak_allocated_bytes", "allocator peak", "bytes", "most that torch's allocator held"),
    Column("peak_reserved_bytes", "reserved peak", "bytes", "most that torch's allocator took from the device", False),
    Column("device_used_bytes", "device used", "bytes", "what the device reports as used, above what was before"),
    Column("predicted_bytes", "predicted", "bytes", "weights plus keys and values, computed"),
    Column("energy_j", "energy", "J", "per call"),
    Column("energy_per_token_j", "energy/token", "J", "per token"),
    Column("power_w", "power", "W", "the driver's average over up to a second", False),
    Column("sm_clock_hz", "SM clock", "Hz", "median over blocks", False),
    Column("sm_clock_low_hz", "lowest clock", "Hz", "of the slowest block", False),
    Column("temperature_c", "temperature", "°C", "", False),
    Column("throttle", "throttle", "text", "reasons that the driver gave while the cell ran", False),
    Column("flagged", "flagged blocks", "count", "blocks below the run's steady clock, over all runs", False),
    Column("blocks", "blocks", "count", "per run", False),
    Column("sdpa_backend", "SDPA", "text", "backend that attention took", False),
    Column("reason", "reason", "text", "why there is no figure"),
    Column("cell", "cell", "id", "the test's id: what pytest runs", False),
)
LISTED = {column.key for column in COLUMNS}
# Never a column of their own: the page shows them elsewhere, or another column is made from them.
HIDDEN = {
    *(*results.IDENTITY, *results.STATS, *results.ORIGIN, *results.EXTRA),
}
TEXTS = ("stop_reason", "timing", "versus", "sdpa_backend")


def cell(row: Row) -> str:
    """The test's id without its file: the folder before it tells where pytest was started, not which cell this is."""
    return str(row.get("fullname") or row["name"]).partition("::")[2] or str(row["name"])


def lines(rows: Iterable[Row]) -> list[Line]:
    """One line per experiment, label and cell: cells in the order in which they were first seen, labels by name."""
    found: dict[str, dict[str, dict[str, list[Row]]]] = {}
    for row in rows:
        found.setdefault(row["experiment"], {}).setdefault(cell(row), {}).setdefault(row["label"], []).append(row)
    return [
        _line(_newest(labels[label]))
        for experiment in sorted(found)
        for labels in found[experiment].values()
        for label in sorted(labels)
    ]


def _newest(rows: Sequence[Row]) -> list[Row]:
    """Of a label's rows of a cell those of one commit, the last one to measure it: what it replaced is not averaged
    with it. Where none measured it, the last one that has it at all."""
    last = max(
        [row for row in rows if row["outcome"] == "measured"] or rows, key=lambda row: str(row.get("datetime") or "")
    )
    return [row for row in rows if row.get("commit") == last.get("commit")]


def _line(rows: Sequence[Row]) -> Line:
    measured = [row for row in rows if row["outcome"] == "measured"]
    outcomes = [outcome for outcome in ("measured", "failed", "skipped") if any(r["outcome"] == outcome for r in rows)]
    shown = measured or [row for row in rows if row["outcome"] == outcomes[0]]
    line: Line = {"experiment": rows[0]["experiment"], "label": rows[0]["label"], "cell": cell(rows[0])}
    line |= {"fullname": rows[0].get("fullname"), "outcome": outcomes[0], "params": _params(rows)}
    reasons = dict.fromkeys(row["reason"] for row in rows if row.get("reason"))
    line["reason"] = textwrap.shorten("; ".join(reasons), 110, placeholder=" …") or None
    line |= {key: _middle(shown, key) for key in LISTED - line.keys()}
    line |= {key: _common(shown, key) for key in TEXTS}
    line |= {key: _middle(shown, key) for key in ("bytes", "flops")}
    line["runs"] = len(measured) or None
    line["span"] = _span(measured)
    if line["bytes"] and line["flops"]:
        line["intensity"] = line["flops"] / line["bytes"]
    ends = [row[key] for row in shown for key in ("ratio_low", "ratio_high") if number(row.get(key))]
    line["ratio_span"] = [min(ends), max(ends)] if ends else None
    line["verdict"] = _counts([str(row["verdict"]) for row in shown if row.get("verdict")])
    throttle = [_list(row["throttle"]) for row in shown if row.get("throttle") is not None]
    line["throttle"] = ", ".join(sorted({str(reason) for part in throttle for reason in part})) or None
    if any("flagged_blocks" in row for row in shown):
        line["flagged"] = sum(len(_list(row.get("flagged_blocks"))) for row in shown)
    line["out_of_memory"] = any(row.get("out_of_memory") is True for row in rows)
    return line


def _params(rows: Sequence[Row]) -> dict[str, Any]:
    """What names the cell; of other suites also what is the same in every run."""
    first = rows[0]
    own = [key for key in first if key not in HIDDEN and key not in LISTED and key not in results.PARAMS]
    same = [key for key in own if all(row.get(key) == first[key] for row in rows)]
    keys = [*(key for key in results.PARAMS if key in first), *same]
    return {key: first[key] for key in keys if isinstance(first[key], str | int | float) and finite(first[key])}


def number(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _middle(rows: Sequence[Row], key: str) -> float | bool | None:
    values = [row[key] for row in rows if number(row.get(key))]
    if values:
        return statistics.median(values)
    return False if any(key in row for row in rows) else None


def _common(rows: Sequence[Row], key: str) -> str | None:
    return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key) is not None)) or None


def _span(rows: Sequence[Row]) -> list[float] | None:
    """Lowest and highest run; of one run the quartiles of its samples, if the file has them."""
    if len(rows) > 1:
        values = [row["median"] for row in rows if number(row.get("median"))]
    else:
        values = [row[key] for row in rows for key in ("q1", "q3") if number(row.get(key))]
    return [min(values), max(values)] if len(values) > 1 else None


def _counts(words: Sequence[str]) -> str | None:
    """`faster`, or `faster 2, equivalent 1` where runs differ."""
    kinds = sorted(set(words), key=lambda word: (-words.count(word), word))
    return ", ".join(f"{kind} {words.count(kind)}" for kind in kinds) if len(kinds) > 1 else next(iter(kinds), None)


def _list(value: Any) -> list[Any]:
    """A list that `results` wrote as JSON text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = [value]
    return found if isinstance(found, list) else []


def flagged(rows: Iterable[Row]) -> list[Line]:
    """Every block that ran below the run's steady clock."""
    return [
        {"experiment": row["experiment"], "label": row["label"], "run": row["run"], "cell": cell(row), **block}
        for row in rows
        for block in _list(row.get("flagged_blocks"))
        if isinstance(block, dict)
    ]


def table(found: Sequence[Line], name: str, words: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Lines as one table of the page: columns with a value somewhere; parameters that are the same everywhere apart.

    keys: these of COLUMNS only, after the label and the parameters.
    """
    names = list(dict.fromkeys(key for line in found for key in line["params"]))
    names.sort(key=lambda key: results.PARAMS.index(key) if key in results.PARAMS else len(results.PARAMS))
    values = {key: [line["params"].get(key) for line in found] for key in names}
    constant = {key: values[key][0] for key in names if len(found) > 1 and len(set(map(repr, values[key]))) == 1}
    columns = [Column("label", "label", "label")]
    columns += [Column(key, key.replace("_", " "), "param") for key in names if key not in constant]
    wanted = keys or LISTED - {"experiment"}
    columns += [column for column in COLUMNS if column.key in wanted]
    cells = [[line["params"].get(c.key) if c.kind == "param" else line.get(c.key) for c in columns] for line in found]
    kept = [i for i in range(len(columns)) if any(_told(line[i]) for line in cells)]
    return {
        "name": name,
        "words": words,
        "common": {key: str(value) for key, value in constant.items()},
        "columns": [vars(columns[i]) for i in kept],
        "rows": [[line[i] for i in kept] for line in cells],
    }


def _told(value: Any) -> bool:
    return value is not None and value is not False


def listing(name: str, words: str, columns: Iterable[tuple[str, str, str]], rows: Sequence[Line]) -> dict[str, Any]:
    """A table of the page from rows of any kind: (key, title, kind) for each column."""
    columns = list(columns)
    shown = [{"key": key, "title": title, "kind": kind, "help": "", "main": True} for key, title, kind in columns]
    values = [[_cell(row.get(key), kind) for key, _, kind in columns] for row in rows]
    return {"name": name, "words": words, "common": {}, "columns": shown, "rows": values}


def _cell(value: Any, kind: str) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return value if kind in ("span", "ratios") else ", ".join(map(str, value))
    if kind in ("text", "label", "id", "param"):
        return None if value is None else str(value)
    return value if number(value) else None
