"""Two sides, each a set of runs: how many times more the new side takes, cell by cell.

The unit is the run, never the sample: samples of one run share its clock, heat and placement, and pooling
them calls identical code different most of the time. A cell of a run is one number, the log of its median;
the interval is Welch's on those numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinylm.bench import results
from tinylm.bench.results import BadInput, Row

CONFIDENCE = 0.95
TOO_FEW = "too few runs"
COLUMNS = (
    *("base", "new", "experiment", "cell", "metric", "base_value", "new_value"),
    *("ratio", "low", "high", "base_runs", "new_runs", "verdict"),
)


@dataclass(frozen=True)
class Side:
    """The runs that one argument of the command names. All of one label."""

    name: str
    label: str
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """One cell. `ratio` is new / base of the geometric means over runs; `low` and `high` its 95% interval."""

    base: str
    new: str
    experiment: str
    cell: str
    metric: str
    base_value: float
    new_value: float
    ratio: float
    low: float | None
    high: float | None
    base_runs: int
    new_runs: int
    verdict: str


def side(name: str, rows: list[Row]) -> Side:
    """Raises BadInput for rows of several labels: their runs are no repetitions of each other."""
    labels = sorted({row["label"] for row in rows})
    if len(labels) > 1:
        raise BadInput(f"{name}: holds runs of several labels ({', '.join(labels)}); give the folder of one label")
    return Side(name, labels[0] if labels else results.UNLABELLED, rows)


def compare(base: Side, new: Side, metric: str = "median", threshold: float = 0.0) -> list[Comparison]:
    """Every cell that both sides measured, in the base's order.

    metric: a column of the table (`median`, `mean`, `tokens_per_s`, ...). threshold: the smallest change of
    interest, as a fraction. Raises BadInput for a metric that neither side has.
    """
    before, after = _logs(base, metric), _logs(new, metric)
    if not before and not after:
        known = sorted({key for row in base.rows for key, value in row.items() if _positive(value)})
        raise BadInput(f"metric {metric!r}: no cell has it; expected one of {', '.join(known) or 'none'}")
    found = []
    for key, old in before.items():
        if key not in after:
            continue
        difference, interval = welch(old, after[key])
        low, high = (math.exp(end) for end in interval) if interval else (None, None)
        if base.label != new.label:
            verdict = "other label"
        elif base.label == results.UNLABELLED:
            verdict = "no label"
        else:
            verdict = _verdict(difference, interval, metric, threshold)
        means = math.exp(statistics.fmean(old)), math.exp(statistics.fmean(after[key]))
        sizes = len(old), len(after[key])
        found.append(
            Comparison(base.name, new.name, *key, metric, *means, math.exp(difference), low, high, *sizes, verdict)
        )
    return found


def unpaired(base: Side, new: Side, metric: str) -> tuple[int, int]:
    """How many measured cells only the base has, and only the new side."""
    before, after = set(_logs(base, metric)), set(_logs(new, metric))
    return len(before - after), len(after - before)


def _logs(side: Side, metric: str) -> dict[tuple[str, str], list[float]]:
    """(experiment, cell) -> one log per run."""
    samples: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for row in side.rows:
        value = row.get(metric)
        if row["outcome"] == "measured" and value is not None and _positive(value):
            # The folder before the file's name tells where pytest was started, not which cell this is.
            test = str(row.get("fullname") or row["name"]).partition("::")[2] or row["name"]
            runs = samples.setdefault((row["experiment"], test), {})
            runs.setdefault((row["suite"], row["run"]), []).append(math.log(value))
    return {key: [statistics.fmean(logs) for logs in runs.values()] for key, runs in samples.items()}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def welch(base: Sequence[float], new: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Difference of the means and its 95% interval for unequal variances, if both sides have 2 values or
    more.

    Welch (1947), with the Welch-Satterthwaite degrees of freedom. Without any spread (a count of bytes) the
    interval is the difference itself.
    """
    difference = statistics.fmean(new) - statistics.fmean(base)
    if min(len(base), len(new)) < 2:
        return difference, None
    parts = [statistics.variance(values) / len(values) for values in (base, new)]
    if not sum(parts):
        return difference, (difference, difference)
    from scipy.stats import t

    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (base, new), strict=True))
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(sum(parts))
    return difference, (difference - half, difference + half)


def _verdict(difference: float, interval: tuple[float, float] | None, metric: str, threshold: float) -> str:
    """faster or slower (less or more): the interval leaves out 1 and the ratio reaches the threshold."""
    if interval is None:
        return TOO_FEW
    low, high = interval
    margin = math.log1p(threshold)
    if (low > 0 or high < 0) and abs(difference) >= margin:
        return _words(metric)[difference > 0]
    return "within threshold" if max(-low, high) <= margin else "unclear"


def _words(metric: str) -> tuple[str, str]:
    """What a smaller and a larger value of the metric mean."""
    if metric in results.STATS:
        return "faster", "slower"
    return ("slower", "faster") if metric.endswith("_per_s") or metric == "of_ceiling" else ("less", "more")


# --- how it reads ---

HEADER = ("experiment", "cell", "base", "new", "new / base", "95% interval", "runs", "verdict")


def lines(found: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """One line of text fields a cell, under `HEADER`."""
    return [
        (
            *(c.experiment, c.cell, quantity(c.base_value, c.metric), quantity(c.new_value, c.metric)),
            f"{c.ratio:.4f}",
            "" if c.low is None else f"{c.low:.4f} to {c.high:.4f}",
            *(f"{c.base_runs}, {c.new_runs}", c.verdict),
        )
        for c in found
    ]


def quantity(value: float, metric: str) -> str:
    """`0.00123` -> `1.23 ms` for a time; other metrics are in the unit that their name tells."""
    if metric not in results.STATS or metric == "rounds":
        return f"{value:.4g}"
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")) if value >= s), (1e-9, "ns"))
    return f"{value / scale:.4g} {unit}"


def summary(base: Side, new: Side, found: Sequence[Comparison], metric: str) -> str:
    """What was compared, what was left out, and how far it can be trusted; one line."""
    smaller, _ = _words(metric)
    left, right = unpaired(base, new, metric)
    said = [f"{len(found)} cells in both; ratio of {metric}, below 1 is {smaller}"]
    if left or right:
        said.append(f"{left} cells only in base, {right} only in new")
    if base.label != new.label:
        said.append(f"labels differ ({base.label}, {new.label}): ratios, no verdicts")
    elif base.label == results.UNLABELLED:
        said.append("the machines have no label: no verdicts (`tinylm-bench label FILE --set NAME`)")
    elif any(c.verdict == TOO_FEW for c in found):
        said.append(f"{TOO_FEW} for a verdict in some cells: at least 2 on each side, better 5")
    judged = sum(c.low is not None for c in found)
    if judged > 1 and base.label == new.label:
        said.append(f"each interval fails 1 time in 20, so about {max(1, round(judged / 20))} of {judged} by chance")
    return "; ".join(said) + "."


def csv_text(found: Sequence[Comparison]) -> str:
    """All comparisons with full precision, under `COLUMNS`."""
    rows = [{key: value for key, value in asdict(c).items() if value is not None} for c in found]
    return results.csv_text(rows, COLUMNS)


def markdown(found: Sequence[Comparison], caption: str) -> str:
    """A table for an issue or a page."""
    table = [HEADER, ("---",) * len(HEADER), *lines(found)]
    escaped = ["| " + " | ".join(field.replace("|", "\\|") for field in line) + " |" for line in table]
    return "\n".join([*escaped, "", caption, ""])
