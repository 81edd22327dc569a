"""How a comparison reads: lines for a terminal, a Markdown page, CSV, and what must be said beside them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from tinylm.bench import results
from tinylm.bench.compare import (
    CHANGES,
    NO_LABEL,
    OTHER_LABEL,
    TOO_FEW,
    VERDICTS,
    Comparison,
    Side,
    key,
    measured,
    words,
)
from tinylm.bench.stats import CONFIDENCE

COLUMNS = tuple(field.name for field in dataclasses.fields(Comparison))
HEADER = ("cell", "base", "new", "new / base", "95% interval", "runs", "verdict")
NARROW = ("cell", "ratio", "95% interval", "verdict")  # of a terminal of less than 110 columns
UNITS = (
    *(("flops_per_s", "FLOP/s"), ("bytes_per_s", "B/s"), ("_per_s", "/s"), ("bytes", "B")),
    *(("_j", "J"), ("_w", "W"), ("_hz", "Hz"), ("_s", "s"), ("_c", "°C")),
)
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def lines(found: Sequence[Comparison], narrow: bool = False) -> list[tuple[str, ...]]:
    """One line of text fields a cell, under `HEADER` or `NARROW`."""
    made = []
    for c in found:
        values = quantity(c.base_value, c.metric), quantity(c.new_value, c.metric)
        interval = TOO_FEW if c.low is None or c.high is None else f"{_ratio(c.low)} to {_ratio(c.high)}"
        whole = (_cell(c), *values, _ratio(c.ratio), interval, f"{c.base_runs}, {c.new_runs}", c.verdict)
        made.append(tuple(whole[i] for i in (0, 3, 4, 6)) if narrow else whole)
    return made


def _cell(c: Comparison) -> str:
    """`test_decode[...]` of the experiment `decode` -> `decode[...]`; other tests keep their name after it."""
    short = c.cell.removeprefix("test_")
    return short if short.partition("[")[0] == c.experiment else f"{c.experiment}: {c.cell}"


def _ratio(value: float) -> str:
    return f"{value:.4f}" if 0.01 <= value < 10 else f"{value:.4g}"


def quantity(value: float, metric: str) -> str:
    """`0.00123` -> `1.23 ms` for a time; the name of the metric tells the unit."""
    if metric.startswith("of_"):
        return f"{value:.2%}"
    times = metric in results.STATS and metric != "rounds"
    unit = "s" if times else next((unit for end, unit in UNITS if metric.endswith(end)), "")
    scale, prefix = next((entry for entry in PREFIXES if value >= entry[0]), PREFIXES[-1])
    if not unit or unit == "°C" or (unit == "s" and value >= 1):
        scale, prefix = 1.0, ""
    return f"{value / scale:.4g} {prefix}{unit}".rstrip()


def percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def summary(
    base: Side, new: Side, found: Sequence[Comparison], metric: str, threshold: float, judged: int
) -> list[str]:
    """What was compared and decided, how far it can be trusted, and what was left out: a line for each.

    found: the cells of this base, new side and metric. judged: the cells of the whole command with a p-value.
    """
    counts = Counter(c.verdict for c in found)
    smaller, larger = words(metric)
    verdicts = ", ".join(f"{counts[word]} {word}" for word in VERDICTS if counts[word])
    said = [f"{_count(found)} in both{': ' if verdicts else ''}{verdicts}."]
    wide = [math.log(c.high / c.low) / 2 for c in found if c.low is not None and c.high is not None]
    if found:
        own = " Each interval is 95% for its own cell." if wide else ""
        said.append(f"Ratio of {metric}, new / base: below 1 is {smaller}.{own}")
    if any(c.p is not None for c in found):
        more = f"by more than {percent(threshold)}" if threshold else "at all"
        within = ", equivalent where the interval lies within" if threshold else ""
        said.append(
            f"A cell is called {smaller} or {larger} where it is so {more}{within}. The calls are corrected for "
            f"{judged} cells (Benjamini-Hochberg): at most 5% of the calls are expected to be chance."
        )
    if lost := [c for c in found if c.verdict == "inconclusive" and c.p is not None and c.p <= 1 - CONFIDENCE]:
        said.append(f"{_count(lost)} would be called different alone, not among so many: make more runs.")
    if few := [c for c in found if c.low is None]:
        said.append(
            f"{TOO_FEW.capitalize()} in {_count(few)} ({_runs(few)}): "
            "an interval needs 2 on each side, a small change 5 or more."
        )
    if wide and counts["inconclusive"]:
        said.append(
            f"Half of the intervals are ±{percent(math.expm1(statistics.median(wide)))} or wider ({_runs(found)})."
        )
    if counts[OTHER_LABEL]:
        said.append(f"Labels differ ({base.label}, {new.label}): ratios, no verdicts.")
    if counts[NO_LABEL]:
        said.append("The machines have no label: no verdicts (`tinylm-bench label FILE --set NAME`).")
    return said + _left_out(base, new, metric)


def _left_out(base: Side, new: Side, metric: str) -> list[str]:
    """Cells of one side only and why, cells without the metric, and runs that are on both sides."""
    said = []
    outcomes = [{key(row): row["outcome"] for row in side.rows} for side in (new, base)]
    cells = [set(measured(side, metric)) for side in (base, new)]
    for here, there, other, names in zip(
        cells, reversed(cells), outcomes, (("base", "new"), ("new", "base")), strict=True
    ):
        gone = Counter(other.get(cell, "absent") for cell in here - there)
        gone["without a value"] = gone.pop("measured", 0)
        if here - there:
            why = ", ".join(f"{count} {reason}" for reason, count in gone.items() if count)
            said.append(f"{_count(here - there)} only in {names[0]} (in {names[1]}: {why}).")
    both = [{cell for cell, outcome in side.items() if outcome == "measured"} for side in outcomes]
    if neither := (both[0] & both[1]) - cells[0] - cells[1]:
        said.append(f"{_count(neither)} measured in both without {metric}.")
    runs = [{(row["suite"], row["run"], row.get("datetime")) for row in side.rows} for side in (base, new)]
    if same := runs[0] & runs[1]:
        said.append(f"{len(same)} of the runs {'is' if len(same) == 1 else 'are'} on both sides: that hides a change.")
    return said


def _count(cells: Collection[object]) -> str:
    return f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"


def _runs(found: Sequence[Comparison]) -> str:
    """`3 runs against 3`, `1 to 3 runs against 2`."""
    sides = []
    for counts in ([c.base_runs for c in found], [c.new_runs for c in found]):
        least, most = min(counts), max(counts)
        sides.append(f"{least}" if least == most else f"{least} to {most}")
    return f"{sides[0]} run{'' if sides[0] == '1' else 's'} against {sides[1]}"


def tables(
    base: Side, new: Sequence[Side], columns: Sequence[str], found: Sequence[Comparison], threshold: float
) -> Iterator[tuple[str, list[Comparison], list[str]]]:
    """Title, cells and summary for each new side and column."""
    judged = sum(c.p is not None for c in found)
    for side in new:
        for metric in columns:
            cells = [c for c in found if (c.new, c.metric) == (side.name, metric)]
            yield f"{base.name} → {side.name}, {metric}", cells, summary(base, side, cells, metric, threshold, judged)


def changed(found: Sequence[Comparison]) -> list[Comparison]:
    return [c for c in found if c.verdict in CHANGES]


def csv_text(found: Sequence[Comparison]) -> str:
    """All comparisons with full precision, under `COLUMNS`."""
    rows = [{name: value for name, value in dataclasses.asdict(c).items() if value is not None} for c in found]
    return results.csv_text(rows, COLUMNS)


def markdown(found: Sequence[Comparison], title: str, said: Sequence[str]) -> str:
    """A heading, what was decided, and a table, for an issue or a page."""
    table = [HEADER, ("---",) * len(HEADER), *lines(found)] if found else []
    escaped = ["| " + " | ".join(field.replace("|", "\\|") for field in line) + " |" for line in table]
    return "\n".join([f"### {title}", "", *(f"- {line}" for line in said), "", *escaped, ""])
