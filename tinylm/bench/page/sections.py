"""The report's sections that are not experiments: machines, telemetry, verdicts, calibration, wall time, commands.

Each function takes rows, lines (of `sheet`) or documents and gives what the template shows; text is plain, the
template escapes it. What is not there is said, never left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tinylm.bench import footprint, results
from tinylm.bench import wall as wall_time
from tinylm.bench.page import sheet
from tinylm.bench.page.charts import amount, prefixed
from tinylm.bench.page.sheet import Line, number
from tinylm.bench.results import Row

Documents = Sequence[tuple[Row, Mapping[str, Any]]]
FACTS = (
    ("device", "name", "device"),
    ("device", "memory_bytes", "memory"),
    ("device", "compute_capability", "compute capability"),
    ("device", "multiprocessors", "multiprocessors"),
    ("device", "power_limit_w", "power limit (W)"),
    ("device", "driver", "driver"),
    ("device", "cuda", "CUDA"),
    ("device", "torch", "torch"),
    ("device", "on_battery", "on battery"),
    ("device", "wsl", "WSL"),
    ("cpu", "brand_raw", "processor"),
    ("cpu", "count", "logical processors"),
    ("", "system", "system"),
    ("", "release", "kernel"),
    ("", "python_version", "Python"),
)


def count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


# --- machines ---


def machines(documents: Documents, rows: Sequence[Row], pens: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Per label: facts, ceilings, runs, and why readings are null."""
    found = []
    for pen in pens:
        own = [(run, document) for run, document in documents if run["label"] == pen["label"]]
        facts: list[tuple[str, str]] = []
        for part, key, title in FACTS:
            told = [_dict(document.get("machine_info")) for _, document in own]
            values = [(_dict(info.get(part)) if part else info).get(key) for info in told]
            texts = [_fact(key, value) for value in values if value is not None and value != ""]
            if texts and set(texts) != {"no"} and (title, texts[0]) not in {("processor", value) for _, value in facts}:
                facts.append((title, " / ".join(dict.fromkeys(texts))))
        reasons = {k: v for _, document in own for k, v in _dict(document.get("null_reasons")).items()}
        lines = [row for row in rows if row["label"] == pen["label"]]
        found.append(
            {
                "pen": pen,
                "facts": [*facts, *ceilings(lines)],
                "runs": [_run(run, document) for run, document in own],
                "null_reasons": sorted((str(key), str(value)) for key, value in reasons.items()),
            }
        )
    return found


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _fact(key: str, value: Any) -> str:
    if key == "memory_bytes" and number(value):
        return f"{value / 2**30:.1f} GiB"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def ceilings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What the card itself was measured to do, in words."""
    found = []
    roof = roofs(rows)
    for key, title in (("bytes", "copy, read plus written"), ("read", "reading alone")):
        if roof[key]:
            found.append((f"ceiling: {title}", prefixed(roof[key], "B/s")))
    return found + [(f"ceiling: {dtype} arithmetic", prefixed(v, "FLOP/s")) for dtype, v in roof["flops"].items()]


def roofs(rows: Sequence[Row]) -> dict[str, Any]:
    """Median ceilings of one label: bytes/s copied and read, FLOP/s per dtype."""

    def middle(key: str, part: Sequence[Row]) -> float | None:
        values = [row[key] for row in part if number(row.get(key)) and row[key] > 0]
        return statistics.median(values) if values else None

    dtypes = sorted({str(row["dtype"]) for row in rows if row.get("dtype") and row.get("ceiling_flops_per_s")})
    flops = {d: middle("ceiling_flops_per_s", [row for row in rows if row.get("dtype") == d]) for d in dtypes}
    return {
        "bytes": middle("ceiling_bytes_per_s", rows),
        "read": middle("ceiling_read_bytes_per_s", rows),
        "flops": {dtype: value for dtype, value in flops.items() if value},
    }


def _run(run: Row, document: Mapping[str, Any]) -> dict[str, Any]:
    commit = _dict(document.get("commit_info"))
    return {
        "name": "/".join(filter(None, (str(run["suite"]), str(run["run"])))),
        "datetime": str(document.get("datetime") or "")[:16].replace("T", " "),
        "commit": str(commit.get("id") or "")[:12],
        "dirty": bool(commit.get("dirty")),
        **{part: len(document.get(part) or []) for part in ("benchmarks", "skipped", "failed")},
    }


# --- what is beside the times ---


def memory(lines: Sequence[Line], labels: Sequence[str]) -> list[str]:
    """What was taken over what was predicted, per label; nothing of experiments that predict no memory."""
    said = []
    for label in labels:
        own = [line for line in lines if line["label"] == label]
        for key, name in (
            ("peak_allocated_bytes", "peak of the allocator"),
            ("device_used_bytes", "used on the device"),
        ):
            known = [line for line in own if number(line[key]) and number(line["predicted_bytes"])]
            # The fixed cost of a process hides what small models take.
            large = [line for line in known if line["predicted_bytes"] >= 2**30]
            if large:
                ratios = [line[key] / line["predicted_bytes"] for line in large]
                ends = " to ".join(dict.fromkeys(amount(end(ratios), "×") for end in (min, max)))
                said.append(
                    f"{label}: {name} is {ends} the prediction in {count(len(large), 'cell')} of 1 GiB or more."
                )
        split = [line for line in own if all(number(line.get(part)) for part in footprint.PARTS)]
        if split:
            spans = []
            for part in footprint.PARTS:
                sizes = [line[part] / 2**20 for line in split]
                span = " to ".join(dict.fromkeys(f"{end(sizes):.0f}" for end in (min, max)))
                spans.append(f"{part.removesuffix('_bytes')} {span}")
            said.append(f"{label}: beyond the prediction, in MiB over {count(len(split), 'cell')}: {', '.join(spans)}.")
    return said


def roofline(lines: Sequence[Line], rows: Sequence[Row], labels: Sequence[str]) -> dict[str, Any]:
    """The roofs, and in words where each label's cells lie under them."""
    found, said = [], []
    for label in labels:
        roof = roofs([row for row in rows if row["label"] == label])
        cells = [line for line in lines if line["label"] == label and line.get("intensity") and line["flops_per_s"]]
        if not cells or not roof["bytes"]:
            continue
        found.append({"label": label, **roof})
        tops = [roof["flops"].get(line["params"].get("dtype")) for line in cells]
        known = [(line, top) for line, top in zip(cells, tops, strict=True) if top]
        left = [line for line, top in known if line["intensity"] < top / roof["bytes"]]
        shares = [line["flops_per_s"] / min(top, line["intensity"] * roof["bytes"]) for line, top in known]
        low, high = (end(line["intensity"] for line in cells) for end in (min, max))
        text = f"{label}: {count(len(cells), 'cell')} between {amount(low)} and {amount(high)} FLOP/byte"
        if known:
            text += (
                f"; {len(left)} of {len(known)} lie left of their ridge, where memory is the limit; they reach "
                f"{amount(100 * min(shares))} to {amount(100 * max(shares))} % of the roof above them, "
                f"{amount(100 * statistics.median(shares))} % in the middle"
            )
        said.append(text + ".")
    without = sum(1 for line in lines if line["outcome"] == "measured" and not line.get("intensity"))
    if without and found:
        said.append(f"{count(without, 'measured cell')} declared no operations or no bytes, and cannot be placed here.")
    return {"roofs": found, "said": said}


def missing(documents: Documents) -> list[dict[str, Any]]:
    """Skipped and failed cells, together where label, experiment and reason are the same; runs are counted."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for run, document in documents:
        for row in results.rows_of(dict(document), run):
            if row["outcome"] != "measured":
                reason = row.get("reason") or "no reason recorded"
                shared = "out of memory" if row.get("out_of_memory") is True else reason
                key = (row["outcome"], row["label"], row["experiment"], shared)
                groups.setdefault(key, []).append(sheet.cell(row))
                if shared != reason:
                    groups[key][-1] += f": {reason}"
    order = sorted(groups, key=lambda key: (key[0] != "failed", *key[1:]))
    return [
        {"outcome": key[0], "label": key[1], "experiment": key[2], "reason": key[3], "cells": _unique(groups[key])}
        for key in order
    ]


def _unique(cells: Sequence[str]) -> list[str]:
    """Each cell once; of texts that differ in numbers only (as process ids) the first."""
    seen: dict[str, str] = {}
    for cell in cells:
        seen.setdefault(cell.partition(": ")[0], cell)
    return list(seen.values())


def wall(documents: Documents) -> dict[str, Any]:
    """Seconds per phase of each run that recorded them."""
    rows: list[Line] = []
    without = []
    for run, document in documents:
        phases = {str(k): v for k, v in _dict(document.get("wall_s")).items() if number(v) and v >= 0}
        name = "/".join(filter(None, (str(run["suite"]), str(run["run"]))))
        if phases:
            rows.append({"label": run["label"], "run": name, "total": sum(phases.values()), "phases": phases})
        else:
            without.append(f"{run['label']} {name}")
    names = list(dict.fromkeys(phase for row in rows for phase in row["phases"]))
    said = []
    for row in rows:
        shares = [f"{name} {100 * s / row['total']:.1f} %" for name, s in row["phases"].items() if row["total"]]
        besides = wall_time.overhead(row["phases"])
        ending = "" if besides is None else f"; after preparation {100 * besides:.1f} % is neither work nor flush"
        said.append(f"{row['label']} {row['run']}: {row['total']:.0f} s, {', '.join(shares)}{ending}.")
    # Keys of their own: a phase may be called as another column is.
    shown = [{**row, **{f"phase {name}": row["phases"].get(name) for name in names}} for row in rows]
    columns = [("label", "label", "label"), ("run", "run", "text"), ("total", "total", "seconds")]
    columns += [(f"phase {name}", name.replace("_", " "), "seconds") for name in names]
    table = sheet.listing("wall", "Wall time of each run by phase", columns, shown)
    return {"table": table, "phases": names, "rows": rows, "without": without, "said": said}
