"""Two sides or more, each a set of runs: how many times more the new side takes, cell by cell, and whether
that is a change.

The unit is the run, never the sample: samples of one run share its clock, heat and placement, and pooling
them calls identical code different most of the time. A cell of a run is one number, the log of its median;
the interval is Welch's on those numbers. A verdict is a minimum-effect test: the change must be shown to be
*more* than the threshold. Runs made one after the other share the state of their machine, so enough of them
show some difference between any two sides; a test against exactly none would call that a change.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinylm.bench import results, stats
from tinylm.bench.results import BadInput, Row

# What people call a metric -> columns of the table; the first that a cell of both sides has.
METRICS = {
    "time": ("median",),
    "tokens": ("tokens_per_s",),
    "memory": ("peak_allocated_bytes", "device_used_bytes"),
    "energy": ("energy_j",),
    "ceiling": ("of_ceiling",),
}
TIMES = ("median", "min", "max", "mean", "q1", "q3")
TOO_FEW, OTHER_LABEL, NO_LABEL = "too few runs", "other label", "no label"
CHANGES = ("slower", "faster", "more", "less")
VERDICTS = (*CHANGES, "equivalent", "inconclusive", TOO_FEW)
ANY_CHANGE, MISSING = "any-change", "missing"
# The least spread of log times from run to run that is believed: two runs agree better by chance, or because
# the clock's step hides the rest. Ten processes within 0.3%, the best that is promised, are 0.1%.
FLOOR = 1e-3


@dataclass(frozen=True)
class Side:
    """The runs that one argument of the command names. All of one label."""

    name: str
    label: str
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """One cell. `ratio` is new / base of the geometric means over runs; `low` and `high` its 95% interval;
    `p` is of the hypothesis that it changed by no more than the threshold, `p_adjusted` the same for the
    number of cells judged. None: the runs do not tell."""

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
    p: float | None
    p_adjusted: float | None
    base_runs: int
    new_runs: int
    verdict: str


def side(name: str, rows: list[Row]) -> Side:
    """Raises BadInput for rows of several labels: their runs are no repetitions of each other."""
    labels = sorted({row["label"] for row in rows})
    if len(labels) > 1:
        raise BadInput(f"{name}: holds runs of several labels ({', '.join(labels)}); give the folder of one label")
    return Side(name, labels[0] if labels else results.UNLABELLED, rows)


def fraction(text: str) -> float:
    """`2%` and `0.02` -> 0.02. Raises BadInput for what is neither: 2 may have been meant as 2%."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else math.inf
    if value >= 1 and not (match and match[2] and value < math.inf):
        raise BadInput(f"{text!r}: expected a share such as 2% or 0.02")
    return value


def column(metric: str, sides: Sequence[Side]) -> str:
    """The column that a word for a metric means here. Raises BadInput where no cell of any side has it."""
    found = {key for side in sides for row in side.rows for key, value in row.items() if _positive(value)}
    names = METRICS.get(metric, (metric,))
    on_all = (name for name in names if all(any(_positive(row.get(name)) for row in s.rows) for s in sides))
    chosen = next(on_all, None) or next((name for name in names if name in found), None)
    if chosen is None:
        words = [word for word, columns in METRICS.items() if not found.isdisjoint(columns)]
        known = ", ".join([*words, *sorted(found.difference(results.PARAMS, results.ORIGIN))])
        raise BadInput(f"metric {metric!r}: no cell has it; expected one of {known or 'none: no cell was measured'}")
    return chosen


def compare(base: Side, new: Sequence[Side], columns: Sequence[str], threshold: float) -> list[Comparison]:
    """Every cell that the base and a new side measured, for each new side and column, in the base's order.

    threshold: the smallest change of interest, as a fraction. The verdicts hold for all cells together: the
    p-values of all of them are adjusted by Benjamini and Hochberg's method.
    """
    margin = math.log1p(threshold)
    found = [cell for side in new for metric in columns for cell in _cells(base, side, metric, margin)]
    judged = [cell.p for cell in found if cell.p is not None]
    adjusted = iter(stats.adjusted(judged))
    return [_judged(cell, next(adjusted), threshold) if cell.p is not None else cell for cell in found]


def _cells(base: Side, new: Side, metric: str, margin: float) -> Iterable[Comparison]:
    before, after = measured(base, metric), measured(new, metric)
    for cell, old in before.items():
        if not (now := after.get(cell)):
            continue
        # A count, of bytes for example, may come out the same in every run; a time that does has no spread to see.
        floor = 0.0 if all(isinstance(value, int) for value in (*old, *now)) else FLOOR
        logs = [math.log(value) for value in old], [math.log(value) for value in now]
        means = statistics.mean(logs[0]), statistics.mean(logs[1])
        difference = stats.welch(logs[0], logs[1], floor)
        low, high = map(math.exp, difference.interval()) if difference else (None, None)
        p, verdict = (difference.p(margin), "") if difference else (None, TOO_FEW)
        if base.label != new.label or base.label == results.UNLABELLED:
            p, verdict = None, OTHER_LABEL if base.label != new.label else NO_LABEL
        yield Comparison(
            base=base.name,
            new=new.name,
            experiment=cell[0],
            cell=cell[1],
            metric=metric,
            base_value=old[0] if len(set(old)) == 1 else math.exp(means[0]),
            new_value=now[0] if len(set(now)) == 1 else math.exp(means[1]),
            ratio=math.exp(means[1] - means[0]),
            low=low,
            high=high,
            p=p,
            p_adjusted=None,
            base_runs=len(old),
            new_runs=len(now),
            verdict=verdict,
        )


def _judged(cell: Comparison, p_adjusted: float, threshold: float) -> Comparison:
    """faster or slower (less or more) after the correction; equivalent by the interval, as in a pair."""
    assert cell.low is not None and cell.high is not None
    if p_adjusted <= 1 - stats.CONFIDENCE:
        verdict = words(cell.metric)[cell.ratio > 1]
    else:
        verdict = "equivalent" if stats.verdict(cell.low, cell.high, threshold) == "equivalent" else "inconclusive"
    return dataclasses.replace(cell, p_adjusted=p_adjusted, verdict=verdict)


def measured(side: Side, metric: str) -> dict[tuple[str, str], list[Any]]:
    """(experiment, cell) -> one value per run."""
    samples: dict[tuple[str, str], dict[tuple[str, str], list[Any]]] = {}
    for row in side.rows:
        if row["outcome"] == "measured" and _positive(value := row.get(metric)):
            runs = samples.setdefault(key(row), {})
            runs.setdefault((row["suite"], row["run"]), []).append(value)
    # The same cell twice in one run: files of one name in several folders.
    return {
        cell: [values[0] if len(values) == 1 else statistics.geometric_mean(values) for values in runs.values()]
        for cell, runs in samples.items()
    }


def key(row: Row) -> tuple[str, str]:
    """What names a cell. The folder before the file's name tells where pytest was started, not which cell."""
    return row["experiment"], str(row.get("fullname") or row["name"]).partition("::")[2] or row["name"]


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def missing(base: Side, new: Side, metric: str) -> int:
    """How many cells only the base has."""
    return len(measured(base, metric).keys() - measured(new, metric).keys())


def words(metric: str) -> tuple[str, str]:
    """What a smaller and a larger value of the metric mean."""
    if metric in TIMES:
        return "faster", "slower"
    return ("slower", "faster") if metric.endswith("_per_s") or metric == "of_ceiling" else ("less", "more")


def fail_words(given: Iterable[str], columns: Sequence[str]) -> tuple[str, ...]:
    """`slower,more` or one by one -> verdicts. Raises BadInput for a word that no cell of the metrics can get."""
    possible = {word for metric in columns for word in words(metric)}
    known = [*(word for word in CHANGES if word in possible), ANY_CHANGE, "inconclusive", MISSING]
    asked = split(given)
    for word in asked:
        if word not in known:
            raise BadInput(f"--fail-on {word}: expected one of {', '.join(known)} for the metric {', '.join(columns)}")
    return tuple(dict.fromkeys(verdict for word in asked for verdict in (CHANGES if word == ANY_CHANGE else (word,))))


def split(given: Iterable[str]) -> list[str]:
    """Options that may be repeated or hold a list: `a,b` and `c` -> a, b, c, each once."""
    return list(dict.fromkeys(word.strip() for part in given for word in part.split(",") if word.strip()))


def failing(found: Sequence[Comparison], missing: int, asked: Sequence[str]) -> tuple[bool, str]:
    """Whether a cell has a verdict that was asked for, and how many have, or could not have. missing: cells that
    only the base has. Raises BadInput where no cell could be judged: that is no pass."""
    unjudged = [cell for cell in found if cell.p is None]
    failed = sum(cell.verdict in asked for cell in found) + missing * (MISSING in asked)
    if len(unjudged) == len(found) and not failed:
        reasons = sorted({cell.verdict for cell in unjudged}) or ["no cell is in both"]
        raise BadInput(
            f"--fail-on {','.join(asked)}: none of {len(found)} cells can be judged ({', '.join(reasons)}); "
            "give 2 runs or more of the same cells and label on each side"
        )
    said = f"{failed} of {len(found) + missing} cells"
    said += f"; {len(unjudged)} could not be judged" if unjudged else ""
    said += f"; {missing} only in base" if missing and MISSING not in asked else ""
    return failed > 0, f"--fail-on {','.join(asked)}: {said}"
