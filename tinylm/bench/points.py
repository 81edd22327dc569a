"""The table of all runs to the points that pictures show: one for each label, cell and quantity.

A point is a median over runs, of the newest commit that a label has the cell of; its spread is the lowest and the
highest run, or, where there is one run only, the quartiles of its samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tinylm.bench import results
from tinylm.bench.crossover import crossover
from tinylm.bench.look import ordered, words

RUN = ["label", "suite", "run"]
CELL = list(results.PARAMS)


@dataclass(frozen=True)
class Quantity:
    """A column of the table as it is drawn: times `scale`, in `unit`.

    kind: how the quartiles of the samples carry over: to a `rate`, to a `time`, or not at all (`state`).
    """

    text: str
    unit: str
    column: str
    scale: float = 1.0
    kind: str = "rate"


TOKENS = Quantity("speed", "tokens/s", "tokens_per_s")
BANDWIDTH = Quantity("bandwidth", "GB/s", "bytes_per_s", 1e-9)
SHARE = Quantity("share of ceiling", "%", "of_ceiling", 100)
TIME = Quantity("time", "ms", "median", 1e3, "time")
ALLOCATED = Quantity("peak of the allocator", "GiB", "peak_allocated_bytes", 2**-30, "state")
USED = Quantity("used on the device", "GiB", "device_used_bytes", 2**-30, "state")
PREDICTED = Quantity("predicted (weights + KV)", "GiB", "predicted_bytes", 2**-30, "state")
FIRST_TOKEN = Quantity("time to first token", "ms", "median", 1e3, "time")
EXHAUSTED = Quantity("out of memory", "GiB", "predicted_bytes", 2**-30, "state")
CAPACITY = Quantity("memory of the device", "GiB", "device_memory_bytes", 2**-30, "state")

MEMORY = (ALLOCATED, PREDICTED, USED, CAPACITY, EXHAUSTED)
CROSSOVER, SIDES = "crossover", ("dense", "none")

# Bytes of an element, and the input that shows what memory allows: far more than any cache, on most cards.
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
LARGE_MIB = 512


def cells(table: pd.DataFrame, experiment: str, outcome: str = "measured") -> pd.DataFrame:
    """The rows of an experiment with every parameter as text, empty where it does not apply."""
    rows = table[(table["experiment"] == experiment) & (table["outcome"] == outcome)]
    return rows.assign(**{key: rows[key].map(_text).astype(object) if key in rows else "" for key in CELL})


def _text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def valued(rows: pd.DataFrame, quantity: Quantity) -> pd.DataFrame:
    """The rows that have a value, with `value`, and `low` and `high` from the quartiles of the samples."""

    def number(key: str) -> pd.Series:
        return pd.to_numeric(rows[key], errors="coerce") if key in rows else pd.Series(np.nan, rows.index)

    value = number(quantity.column).astype(float) * quantity.scale
    median, q1, q3 = number("median"), number("q1"), number("q3")
    low, high = {
        "rate": (value * median / q3, value * median / q1),
        "time": (value * q1 / median, value * q3 / median),
        "state": (value, value),
    }[quantity.kind]
    # JSON of other tools may lack the quartiles.
    rows = rows.assign(value=value, low=low.fillna(value), high=high.fillna(value))
    return rows.assign(quantity=quantity.text, unit=quantity.unit)[np.isfinite(value)]


def relative(rows: pd.DataFrame, axis: str, baseline: str, text: str) -> pd.DataFrame:
    """Each row's value over that of the same run's cell that differs in `axis` only: `baseline` there."""
    keys = [*RUN, *(key for key in CELL if key != axis)]
    base = rows[rows[axis] == baseline][[*keys, "value", "low", "high"]]
    both = rows[rows[axis] != baseline].merge(base, on=keys, suffixes=("", "_base"))
    ratios = {
        "value": both["value"] / both["value_base"],
        "low": both["low"] / both["high_base"],
        "high": both["high"] / both["low_base"],
    }
    return both.assign(**ratios, quantity=text, unit="×")


def over_runs(*parts: pd.DataFrame) -> pd.DataFrame:
    """One point per label, cell and quantity, in the order in which they are shown."""
    keys = ["label", *CELL, "quantity", "unit"]
    columns = [*RUN, *keys[1:], "value", "low", "high", *(key for key in ("commit", "datetime") if key in parts[0])]
    rows = _newest(pd.concat([part[columns] for part in parts if len(part)] or parts[:1], ignore_index=True), keys)
    runs = rows.groupby([*RUN, *keys[1:]], sort=False)[["value", "low", "high"]].median().reset_index()
    groups = runs.groupby(keys, sort=False)
    points = groups["value"].agg(value="median", low="min", high="max", runs="size")
    once = points["runs"] == 1
    points["low"] = points["low"].mask(once, groups["low"].median())
    points["high"] = points["high"].mask(once, groups["high"].median())
    points["spread"] = np.where(once, "quartiles of the samples", "lowest and highest run")
    # A reading of one run, as of memory, has no spread at all.
    points.loc[once & (points["low"] == points["high"]), "spread"] = ""
    points = points.reset_index()
    points = points.drop(columns=[key for key in CELL if (points[key] == "").all()])
    keys = [key for key in keys if key in points]
    ranks = {key: ordered(points, key) for key in keys}
    return points.sort_values(keys, key=lambda column: column.map(ranks[column.name].index), ignore_index=True)


def _newest(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Of what has the same keys the runs of one commit, the last one to be measured: what it replaced is not averaged
    with it."""
    if rows.empty or "commit" not in rows:
        return rows
    rows = rows.assign(commit=rows["commit"].map(_text), datetime=rows["datetime"].map(_text))
    same = rows.sort_values("datetime", kind="stable").groupby(keys, sort=False)
    return rows[rows["commit"] == same["commit"].transform("last").reindex(rows.index)]


def configuration(rows: pd.DataFrame, *first: str) -> pd.DataFrame:
    """The rows of one preset, dtype and batch: that of most values in the columns `first`, in their order."""
    keys = ["preset", "dtype", "batch"]
    if rows.empty:
        return rows
    counts = (
        rows.groupby(keys, sort=False)[list(first)].nunique().sort_values(list(first), ascending=False, kind="stable")
    )
    return rows[(rows[keys] == list(counts.index[0])).all(axis="columns")]


def kv_speed(table: pd.DataFrame) -> pd.DataFrame:
    return over_runs(valued(cells(table, "kv_cache"), TOKENS))


def kv_speedup(table: pd.DataFrame) -> pd.DataFrame:
    return over_runs(relative(valued(cells(table, "kv_cache"), TOKENS), "cache", "none", "speed-up"))


def kv_panels(table: pd.DataFrame) -> pd.DataFrame:
    """Two configurations at most: the one that most labels measured, and the one at most contexts."""
    rows = valued(cells(table, "kv_cache"), TOKENS)
    chosen = configuration(rows, "label", "context").index.union(configuration(rows, "context", "label").index)
    rows = rows.loc[chosen]
    return over_runs(rows, relative(rows, "cache", "none", "speed-up"))


def kv_times(table: pd.DataFrame) -> pd.DataFrame:
    """Each side by its fastest runner, and the crossover: where the side with a cache becomes the faster one.

    Without the contexts whose fastest runner takes longer than another one, which was not measured there, at a longer
    context, and without those next to which, on either side, such another one is the fastest.
    """
    rows = valued(cells(table, "kv_cache"), TIME)
    points = over_runs(rows[rows["cache"].isin(SIDES) & rows["context"].ne("")])
    if points.empty:
        return points
    keys = [key for key in ("label", *CELL) if key in points and key not in ("impl", "context", "cache")]
    best = points.loc[points.groupby([*keys, "context", "cache"])["value"].idxmin().sort_values()]
    for _, line in points.groupby([*keys, "cache"]):
        fastest = best[best.index.isin(line.index)]
        best = best.drop([i for i, row in fastest.iterrows() if beaten(row, fastest, line)])
    best = best.assign(quantity=[words("cache", side) for side in best["cache"]])
    parts = [best]
    for _, rows in best.groupby(keys):
        sides = (rows[rows["cache"] == side] for side in SIDES)
        found = crossover(*(dict(zip(side["context"].astype(int), side["value"], strict=True)) for side in sides))
        if found is not None:
            length, value = found
            mark = rows[:1].assign(context=str(round(length)), value=value, low=value, high=value)
            parts.append(mark.assign(quantity=CROSSOVER, cache="", impl="", spread=""))
    return pd.concat(parts, ignore_index=True)


def beaten(row: pd.Series, fastest: pd.DataFrame, line: pd.DataFrame) -> bool:
    """Whether a runner that the line has not at the row's context is the faster one at a longer context, or the fastest
    at the next shorter and the next longer one."""
    lengths, length = fastest["context"].astype(int), int(row["context"])
    absent = ~fastest["impl"].isin(line[line["context"] == row["context"]]["impl"])
    if (absent & (lengths > length) & (fastest["value"] < row["value"])).any():
        return True
    sides = fastest.loc[[*lengths[lengths < length].nlargest(1).index, *lengths[lengths > length].nsmallest(1).index]]
    return len(sides) == 2 and sides["impl"].nunique() == 1 and bool(absent[sides.index].all())


def kv_one_length(table: pd.DataFrame) -> pd.DataFrame:
    """The configuration that most labels measured, at the longest context that all of them have."""
    rows = configuration(valued(cells(table, "kv_cache"), TOKENS), "label", "context")
    contexts = [set(part["context"]) for _, part in rows.groupby("label")]
    common = set.intersection(*contexts) if contexts else set()
    return over_runs(rows[rows["context"] == max(common, key=int, default="")])


def rmsnorm_alone(table: pd.DataFrame) -> pd.DataFrame:
    """The cells of RMSNorm that move data: not those with a sum, and not the host's time for a call."""
    rows = cells(table, "rmsnorm")
    rows = rows[rows["op"].isin(["", "rmsnorm"]) & (rows["phase"] == "")]
    elements = pd.to_numeric(rows["rows"]) * pd.to_numeric(rows["hidden"])
    # Sizes are told apart by powers of two: rows are whole.
    size = np.log2(elements.astype(float)).round()
    return rows.assign(size=size, mib=2**size * rows["dtype"].map(WIDTHS).fillna(4) / 2**20)


def large_inputs(table: pd.DataFrame) -> pd.DataFrame:
    """RMSNorm at one size of input: the largest up to 0.5 GiB that a label measured at 3 hidden sizes or more.

    Without this, one line would join inputs that fit in a cache with others that do not. Larger ones are not measured
    with every backend. Hidden sizes that are no multiple of 8 would be teeth in a line: `rmsnorm_share` shows them.
    """
    rows = rmsnorm_alone(table)
    rows = rows[(rows["mib"] <= LARGE_MIB) & (pd.to_numeric(rows["hidden"]) % 8 == 0)]
    keys = ["label", "dtype", "direction"]
    sizes = rows.groupby([*keys, "size"])["hidden"].nunique().clip(upper=3).rename("points").reset_index()
    best = sizes.sort_values(["points", "size"]).drop_duplicates(keys, keep="last")
    return rows.merge(best[[*keys, "size"]], on=[*keys, "size"])


def rmsnorm(table: pd.DataFrame) -> pd.DataFrame:
    rows = large_inputs(table)
    return over_runs(valued(rows, BANDWIDTH), valued(rows, SHARE))


def rmsnorm_share(table: pd.DataFrame) -> pd.DataFrame:
    rows = rmsnorm_alone(table)
    return over_runs(valued(rows[(rows["mib"] == LARGE_MIB) & (rows["dtype"] == "bf16")], SHARE))


def rmsnorm_speedup(table: pd.DataFrame) -> pd.DataFrame:
    return over_runs(relative(valued(large_inputs(table), BANDWIDTH), "impl", "eager", "speed-up"))


def memory(table: pd.DataFrame) -> pd.DataFrame:
    rows, skipped = cells(table, "vram"), cells(table, "vram", "skipped")
    out = skipped[skipped["out_of_memory"].eq(True)] if "out_of_memory" in skipped else skipped.iloc[:0]
    everything = pd.concat([rows, out])
    full = ["label", *(key for key in CELL if key != "context")]  # where some context ran out
    limited = everything.merge(out[full].drop_duplicates(), on=full)
    parts = [valued(rows, quantity) for quantity in (ALLOCATED, USED)]
    parts += [valued(everything, PREDICTED), valued(limited, CAPACITY), valued(out, EXHAUSTED)]
    return over_runs(*parts)


def decode(table: pd.DataFrame) -> pd.DataFrame:
    rows = cells(table, "decode")
    return over_runs(valued(rows, TOKENS), valued(rows[rows["phase"] == "prefill"], FIRST_TOKEN))


def ablation(table: pd.DataFrame) -> pd.DataFrame:
    rows = valued(cells(table, "ablation"), TIME)
    speed = rows.assign(value=1 / rows["value"], low=1 / rows["high"], high=1 / rows["low"])
    return over_runs(rows, relative(speed, "impl", "torch", "speed relative to torch"))
