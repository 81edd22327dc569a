"""How far the figures can be trusted, for the report: telemetry, flagged blocks, verdicts inside runs, calibration."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tinylm.bench import calibrate
from tinylm.bench.page import sheet
from tinylm.bench.page.charts import amount
from tinylm.bench.page.sheet import Line, listing, number
from tinylm.bench.results import Row

READINGS = (
    ("sm_clock_hz", "SM clock", "GHz", 1e-9),
    ("temperature_c", "temperature", "°C", 1),
    ("power_w", "power", "W", 1),
)


def telemetry(lines: Sequence[Line], rows: Sequence[Row], labels: Sequence[str]) -> dict[str, Any]:
    """Which readings there are, their ranges in words, throttle reasons, and blocks below the steady clock."""
    said = []
    for label in labels:
        own = [line for line in lines if line["label"] == label]
        parts = []
        for key, name, unit, scale in READINGS:
            values = [line[key] * scale for line in own if number(line.get(key))]
            if values:
                low, high = amount(min(values)), amount(max(values))
                parts.append(f"{name} {low} {unit}" if low == high else f"{name} {low} to {high} {unit}")
        if parts:
            reasons = Counter(reason for line in own for reason in (line["throttle"] or "").split(", ") if reason)
            told = [f"{reason} in {n} of its cells" for reason, n in sorted(reasons.items())]
            if any(row.get("throttle") is not None for row in rows if row["label"] == label):
                parts.append("throttling: " + (", ".join(told) or "none"))
        said.append(f"{label}: {'; '.join(parts)}." if parts else f"{label}: nothing recorded.")
    blocks = sheet.flagged(rows)
    watched = any("flagged_blocks" in row for row in rows)
    readings = [r for r in READINGS if any(number(line.get(r[0])) for line in lines)]
    keys = [("sm_clock_hz", "SM clock (GHz)", 1e-9), ("sm_clock_low_hz", "lowest SM clock (GHz)", 1e-9)]
    keys += [(key, f"{name} ({unit})", scale) for key, name, unit, scale in READINGS[1:]]
    kept = [key for key in keys if any(number(line.get(key[0])) for line in lines)]
    return {"said": said, "readings": kept if readings else [], "flagged": blocks, "watched": watched}


BLOCKS = (
    *(
        ("label", "label", "label"),
        ("experiment", "experiment", "text"),
        ("cell", "cell", "id"),
        ("run", "run", "text"),
    ),
    *(("clock_hz", "SM clock", "Hz"), ("median_s", "time", "time"), ("temperature_c", "temperature", "°C")),
    *(("throttle", "throttle", "text"), ("kept", "kept", "text")),
)


VERDICTS = ("experiment", "versus", "ratio", "ratio_span", "verdict", "median", "runs", "cell")


def verdicts(lines: Sequence[Line], labels: Sequence[str]) -> dict[str, Any]:
    """Comparisons inside runs: a table, and how many verdicts of each kind a label has."""
    judged = [line for line in lines if line["verdict"]]
    said = []
    for label in labels:
        own = [line for line in judged if line["label"] == label]
        if own:
            kinds = Counter(line["verdict"].split(" ")[0].rstrip(",") for line in own)
            told = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
            ratios = [line["ratio"] for line in own if number(line["ratio"])]
            ends = f"; ratios from {amount(min(ratios), '×')} to {amount(max(ratios), '×')}" if ratios else ""
            said.append(f"{label}: {told}{ends}.")
    points = [
        {"label": x["label"], "cell": x["cell"], "ratio": x["ratio"], "ends": x["ratio_span"], "verdict": x["verdict"]}
        for x in sorted(judged, key=lambda x: x["ratio"] if number(x["ratio"]) else 0)
        if number(x["ratio"])
    ]
    return {"said": said, "table": sheet.table(judged, "verdicts", "Verdicts inside runs", VERDICTS), "points": points}


# --- calibration ---

MODES = ("cold", "graph", "hot")
GATED = ("cold", "graph")  # `hot` keeps caches warm, so that it may differ
GATE = {"share": calibrate.ERROR, "from_s": calibrate.SHORT_S, "within_s": calibrate.SHORT_ERROR_S}
MODE_COLUMNS = (
    *(("kernel", "work", "text"), ("kernels", "kernels", "count"), ("bound", "bound by", "text")),
    *(("ncu_s", "Nsight Compute", "time"), ("cold_s", "cold", "time"), ("cold", "cold off by", "signed")),
    *(("graph_s", "graph", "time"), ("graph", "graph off by", "signed"), ("hot_s", "hot", "time")),
    *(("ncu_hot_s", "Nsight, not flushed", "time"), ("hot", "hot off by", "signed")),
    *(("cold_ok", "cold within gate", "text"), ("graph_ok", "graph within gate", "text")),
    ("note", "note", "text"),
)
REPEAT_COLUMNS = (
    *(("kernel", "work", "text"), ("mode", "timing", "text"), ("processes", "processes", "count")),
    *(("median_s", "median", "time"), ("range_s", "low – high", "span"), ("spread", "spread", "share")),
)
ENERGY_COLUMNS = (
    *(("kernel", "work", "text"), ("windows", "windows", "count"), ("joule", "energy a call", "J")),
    *(("range_j", "low – high", "ratios"), ("spread", "spread", "share")),
)


def calibration(label: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """One label's calibration: tables and sentences of the sections that its file has."""
    tables, said = [], []
    modes = [_mode(entry) for entry in _entries(document, "modes")]
    if modes:
        tables.append(listing("modes", f"Timing modes against Nsight Compute on {label}", MODE_COLUMNS, modes))
    for mode in GATED:
        gated = [entry for entry in modes if isinstance(entry.get(f"{mode}_ok"), bool)]
        within = sum(entry[f"{mode}_ok"] for entry in gated)
        if gated:
            worst = max((entry for entry in gated if number(entry[mode])), key=lambda x: abs(x[mode]), default=None)
            ending = f"; farthest off: {100 * worst[mode]:+.2f} % ({worst.get('kernel')})" if worst else ""
            said.append(f"{mode}: {within} of {len(gated)} kernels within the gate{ending}.")
    again = [
        _again(entry, "medians_s", "range_s", "median_s", "processes") for entry in _entries(document, "repeatability")
    ]
    if again:
        tables.append(listing("repeatability", f"Medians of fresh processes on {label}", REPEAT_COLUMNS, again))
        known = [entry["spread"] for entry in again if number(entry.get("spread"))]
        said += [f"Fresh processes: medians at most {100 * max(known):.2f} % apart."] if known else []
    said += _pairs(document.get("pairs"))
    energy = [_again(entry, "joules", "range_j", "joule", "windows") for entry in _entries(document, "energy")]
    if energy:
        tables.append(listing("energy", f"Energy of repeated windows on {label}", ENERGY_COLUMNS, energy))
    reasons = document.get("reasons")
    said += [f"No {section}: {reason}." for section, reason in reasons.items()] if isinstance(reasons, dict) else []
    points = [
        {"mode": mode, "kernel": str(entry.get("kernel")), "ncu_s": entry["ncu_s"], "off": entry[mode]}
        for entry in modes
        for mode in MODES
        if number(entry.get("ncu_s")) and number(entry[mode])
    ]
    told = {"made": str(document.get("datetime") or "")[:16].replace("T", " ")}
    told |= {"commit": str(document.get("commit") or "")[:12], "Nsight Compute": str(document.get("ncu") or "")}
    facts = [(key, value) for key, value in told.items() if value]
    return {"label": label, "facts": facts, "said": said, "tables": tables, "points": points}


def _entries(document: Mapping[str, Any], section: str) -> list[Line]:
    found = document.get(section)
    return [dict(entry) for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _mode(entry: Line) -> Line:
    """With each mode's deviation from Nsight Compute, relative; of `hot` from its figure without a flush."""
    for mode in MODES:
        base = entry.get("ncu_hot_s" if mode == "hot" and "ncu_hot_s" in entry else "ncu_s")
        seconds = entry.get(f"{mode}_s")
        entry[mode] = seconds / base - 1 if number(seconds) and number(base) and base else None
    return entry


def _again(entry: Line, values: str, ends: str, middle: str, size: str) -> Line:
    found = [value for value in entry.get(values) or [] if number(value)]
    if found:
        entry |= {ends: [min(found), max(found)], middle: statistics.median(found), size: len(found)}
    return entry


def _pairs(pairs: Any) -> list[str]:
    """What the comparison made of identical code and of a planted slowdown."""
    if not isinstance(pairs, dict):
        return []
    said = []
    how = [f"threshold {100 * pairs['threshold']:g} %"] if number(pairs.get("threshold")) else []
    how += [f"{pairs['seconds']:g} s a pair"] if number(pairs.get("seconds")) else []
    same, slowed = pairs.get("identical"), pairs.get("slowed")
    setting = f" ({', '.join(how)})" if how else ""
    if isinstance(same, dict) and number(same.get("pairs")) and same["pairs"]:
        share = 100 * (same.get("different") or 0) / same["pairs"]
        rest = [f"{same[name]:,} {name}" for name in ("equivalent", "inconclusive") if number(same.get(name))]
        ending = f" ({', '.join(rest)})" if rest else ""
        said.append(f"Identical code{setting}: called different in {share:.2g} % of {same['pairs']:,} pairs{ending}.")
    if isinstance(slowed, dict) and number(slowed.get("pairs")) and slowed["pairs"]:
        share = 100 * (slowed.get("caught") or 0) / slowed["pairs"]
        size = f" of {100 * slowed['slowdown']:g} %" if number(slowed.get("slowdown")) else ""
        said.append(f"A planted slowdown{size}: caught in {share:.3g} % of {slowed['pairs']:,} pairs.")
    return said
