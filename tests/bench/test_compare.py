"""Comparison: the run is the unit, verdicts hold for all cells together, and none where there is no ground."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench import compare, compare_text, stats
from tinylm.bench.compare import Comparison, Side
from tinylm.bench.results import BadInput

TIMES = st.lists(st.floats(1e-7, 10), min_size=2, max_size=6, unique=True)
CELLS = st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=8)
THRESHOLDS = st.sampled_from([0.0, 0.02, 0.5])


def side(label: str, *medians: float, metric: str = "median", name: str = "test_x[1]") -> Side:
    rows: list[dict[str, Any]] = [
        {"label": label, "suite": "main", "run": f"{label}{i}", "experiment": "x", "outcome": "measured"}
        | {"name": name, "fullname": f"folder{label}/bench_x.py::{name}", metric: value}
        for i, value in enumerate(medians)
    ]
    return compare.side(label, rows)


def sides(cells: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[Side, Side]:
    """A base and a new side of several cells."""
    both = []
    for which, name in enumerate(("base", "new")):
        made = [side("a", *cell[which], name=f"test_x[{i}]") for i, cell in enumerate(cells)]
        both.append(Side(name, "a", [row for part in made for row in part.rows]))
    return both[0], both[1]


def judge(base: Side, new: Side, metric: str = "median", threshold: float = 0.0) -> list[Comparison]:
    return compare.compare(base, [new], [metric], threshold)


def said(base: Side, new: Side, metric: str = "median", threshold: float = 0.02) -> str:
    found = judge(base, new, metric, threshold)
    ((_, cells, lines),) = compare_text.tables(base, [new], [metric], found, threshold)
    assert cells == found
    return "\n".join(lines)


# --- verdicts ---


@given(CELLS, THRESHOLDS)
def test_swapping_the_sides_inverts_ratios_and_verdicts(cells: Any, threshold: float) -> None:
    base, new = sides(cells)
    swapped = {"slower": "faster", "faster": "slower"}
    for there, back in zip(judge(base, new, "median", threshold), judge(new, base, "median", threshold), strict=True):
        assert there.ratio == pytest.approx(1 / back.ratio)
        assert there.ratio == pytest.approx(there.new_value / there.base_value)
        assert there.low is not None and there.high is not None and back.low is not None and back.high is not None
        assert (there.low, there.high) == pytest.approx((1 / back.high, 1 / back.low))
        assert there.low <= there.ratio <= there.high
        assert there.p_adjusted is not None and there.p_adjusted == pytest.approx(back.p_adjusted, rel=1e-6, abs=1e-9)
        if abs(there.p_adjusted - 0.05) > 1e-6:
            assert back.verdict == swapped.get(there.verdict, there.verdict)


@given(CELLS, THRESHOLDS, st.floats(0.1, 10))
def test_a_faster_clock_changes_no_verdict(cells: Any, threshold: float, scale: float) -> None:
    scaled = [([scale * value for value in base], [scale * value for value in new]) for base, new in cells]
    for one, other in zip(
        judge(*sides(cells), "median", threshold), judge(*sides(scaled), "median", threshold), strict=True
    ):
        assert one.ratio == pytest.approx(other.ratio)
        assert one.p_adjusted is not None and one.p_adjusted == pytest.approx(other.p_adjusted, rel=1e-6, abs=1e-9)


@given(TIMES, TIMES, THRESHOLDS)
def test_one_cell_alone_is_judged_by_its_interval(base: list[float], new: list[float], threshold: float) -> None:
    (found,) = judge(*sides([(base, new)]), "median", threshold)
    assert found.low is not None and found.high is not None and found.p == found.p_adjusted
    edges = [abs(abs(math.log(end)) - math.log1p(threshold)) for end in (found.low, found.high)]
    if min(edges) > 1e-9:
        assert found.verdict == stats.verdict(found.low, found.high, threshold)


@given(CELLS, TIMES, TIMES, THRESHOLDS)
def test_more_cells_never_make_a_null_cell_a_finding(
    cells: Any, base: list[float], new: list[float], threshold: float
) -> None:
    """Adjusted p-values are at least the raw ones, and cells without any change only raise them."""
    before = judge(*sides(cells), "median", threshold)
    after = judge(*sides([*cells, ((1.0, 1.0), (1.0, 1.0))]), "median", threshold)
    for one, more in zip(before, after, strict=False):
        assert one.p is not None and one.p == more.p
        assert one.p_adjusted is not None and more.p_adjusted is not None
        assert one.p <= one.p_adjusted <= more.p_adjusted + 1e-12


@pytest.mark.parametrize(
    ("new", "threshold", "verdict"),
    [
        ((1.10, 1.11, 1.09), 0.0, "slower"),
        ((0.90, 0.91, 0.89), 0.02, "faster"),
        ((0.98, 1.02, 1.01), 0.0, "inconclusive"),
        ((1.01, 1.011, 1.009), 0.05, "equivalent"),
        ((1.10, 1.11, 1.09), 0.5, "equivalent"),
        ((1.10, 1.11, 1.09), 0.09, "inconclusive"),  # a change, but not shown to be more than the threshold
        ((0.7, 1.5, 1.2), 0.02, "inconclusive"),
        ((1.1, 1.1, 1.1), 0.02, "slower"),
    ],
)
def test_verdicts(new: tuple[float, ...], threshold: float, verdict: str) -> None:
    (found,) = judge(side("a", 1.0, 1.002, 0.998), side("a", *new), threshold=threshold)
    assert found.verdict == verdict


def test_of_hundreds_of_cells_none_differs_by_chance() -> None:
    """Identical code, 3 runs against 3, 40 commands of 100 cells: a tenth of the cells would be false alarms at
    5% a side and cell; corrected, 5% of the commands may have any. Real changes stay visible among them."""
    noise = random.Random(0)

    def runs(slower: float = 1.0) -> list[float]:
        return [slower * math.exp(noise.gauss(0, 0.004)) for _ in range(3)]

    alarms = alone = caught = 0
    for _ in range(40):
        found = judge(*sides([(runs(), runs()) for _ in range(100)]))
        alarms += any(cell.verdict in compare.CHANGES for cell in found)
        alone += sum(cell.p is not None and cell.p < 0.05 for cell in found)
        found = judge(*sides([(runs(), runs(1.1 if i < 30 else 1.0)) for i in range(100)]), threshold=0.02)
        caught += sum(cell.verdict == "slower" for cell in found[:30])
        assert sum(cell.verdict in compare.CHANGES for cell in found[30:]) <= 1
    assert alarms <= 4 and 100 < alone < 300
    assert caught > 0.9 * 40 * 30


def test_all_sides_and_metrics_are_corrected_together() -> None:
    base, slow, same = side("a", 1.0, 1.01, 0.99), side("a", 1.04, 1.05, 1.03), side("a", 1.0, 1.001, 0.999)
    (alone,) = compare.compare(base, [slow], ["median"], 0.0)
    among = compare.compare(base, [slow, *(Side(str(i), "a", same.rows) for i in range(9))], ["median"], 0.0)
    assert len(among) == 10
    assert alone.p == among[0].p and alone.verdict == "slower"
    assert among[0].p_adjusted == pytest.approx(10 * (alone.p or 0)) and among[0].verdict == "inconclusive"
    ((_, _, lines), *_) = compare_text.tables(base, [slow], ["median"], among[:1], 0.0)
    assert "1 cell would be called different alone" in "\n".join(lines)


# --- no ground for a verdict ---


def test_one_run_gives_a_ratio_and_no_interval() -> None:
    base, new = side("a", 1.0), side("a", 2.0, 2.1)
    (found,) = judge(base, new)
    assert (found.low, found.high, found.p, found.verdict) == (None, None, None, "too few runs")
    assert found.ratio == pytest.approx(math.sqrt(2.0 * 2.1))
    assert "Too few runs in 1 cell (1 run against 2)" in said(base, new)


def test_across_labels_there_are_ratios_with_intervals_and_no_verdicts() -> None:
    base, new = side("a", 1.0, 1.1), side("b", 5.0, 5.1)
    (found,) = judge(base, new)
    assert found.verdict == "other label" and found.p is None and found.low is not None and found.low > 2
    assert "Labels differ (a, b): ratios, no verdicts" in said(base, new)


def test_without_a_label_there_is_no_verdict() -> None:
    base, new = side("unlabelled", 1.0, 1.1), side("unlabelled", 5.0, 5.1)
    assert judge(base, new)[0].verdict == "no label"
    assert "no label: no verdicts" in said(base, new)


def test_a_side_of_several_labels_is_refused() -> None:
    with pytest.raises(BadInput, match="several labels"):
        compare.side("results", side("a", 1.0).rows + side("b", 1.0).rows)


def test_what_is_left_out_is_said() -> None:
    base, new = sides([((1.0, 1.1), (1.0, 1.1)), ((1.0, 1.1), (1.0, 1.1)), ((1.0, 1.1), (1.0, 1.1))])
    new.rows[0]["outcome"] = new.rows[1]["outcome"] = "failed"
    del base.rows[2:4]
    assert compare.missing(base, new, "median") == 1
    text = said(base, new)
    assert "1 cell in both" in text
    assert "1 cell only in base (in new: 1 failed)" in text and "1 cell only in new (in base: 1 absent)" in text
    for row in (*base.rows, *new.rows):
        row["suite"] = row["run"] = "the same"
    assert "1 of the runs is on both sides" in said(base, new)
    base, new = side("a", 1.0), side("a", 1.0)
    base.rows[0]["energy_j"] = None
    assert "1 cell measured in both without energy_j" in said(base, new, "energy_j")


# --- metrics ---


@pytest.mark.parametrize(
    ("metric", "verdict"),
    [
        ("tokens_per_s", "faster"),
        ("of_ceiling", "faster"),
        ("energy_j", "more"),
        ("mean", "slower"),
        ("rounds", "more"),
    ],
)
def test_metrics_have_their_own_direction(metric: str, verdict: str) -> None:
    base, new = side("a", 1.0, 1.01, metric=metric), side("a", 2.0, 2.01, metric=metric)
    assert judge(base, new, metric)[0].verdict == verdict


def test_counts_need_no_spread_and_times_are_given_one() -> None:
    (same,) = judge(side("a", 64, 64, metric="bytes"), side("a", 64, 64, 64, metric="bytes"), "bytes")
    assert (same.ratio, same.low, same.high, same.verdict) == (1, 1, 1, "equivalent")
    (more,) = judge(side("a", 64, 64, metric="bytes"), side("a", 65, 65, metric="bytes"), "bytes")
    assert (more.p, more.verdict) == (0, "more") and more.low == more.high == more.ratio
    # Two times that are equal to the last digit do not say that the next would be.
    (times,) = judge(side("a", 64.0, 64.0), side("a", 64.2, 64.2))
    assert times.verdict == "inconclusive" and times.low is not None and times.low < 1


def test_words_for_metrics() -> None:
    one = side("a", 1.0)
    assert compare.column("time", [one]) == compare.column("median", [one]) == "median"
    memory = side("a", 1.0, metric="peak_allocated_bytes"), side("a", 1.0, metric="device_used_bytes")
    memory[0].rows[0]["device_used_bytes"] = 5
    assert compare.column("memory", memory) == "device_used_bytes"
    assert compare.column("memory", memory[:1]) == "peak_allocated_bytes"
    with pytest.raises(BadInput, match=r"'speed': no cell has it; expected one of time, median$"):
        compare.column("speed", [one])


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.02", 0.02), ("0", 0), (".5 %", 0.005), ("150%", 1.5)])
def test_thresholds(text: str, value: float) -> None:
    assert compare.fraction(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["2", "two", "-1%", "", "%", "nan", "1e9"])
def test_no_thresholds(text: str) -> None:
    with pytest.raises(BadInput, match=r"expected a share such as 2% or 0\.02"):
        compare.fraction(text)


def test_words_to_fail_on() -> None:
    assert compare.fail_words(["slower, more", "slower"], ["median", "bytes"]) == ("slower", "more")
    assert compare.fail_words(["any-change,missing"], ["median"]) == (*compare.CHANGES, "missing")
    with pytest.raises(BadInput, match="--fail-on more: expected one of slower, faster, any-change"):
        compare.fail_words(["more"], ["median"])
    slow = judge(side("a", 1.0, 1.01, 0.99), side("a", 2.0, 2.01, 1.99))
    few = judge(side("a", 1.0), side("a", 2.0))
    assert compare.failing(slow + few, 1, ["slower"]) == (
        *(True, "--fail-on slower: 1 of 3 cells; 1 could not be judged; 1 only in base"),
    )
    assert compare.failing(slow, 0, ["faster"]) == (False, "--fail-on faster: 0 of 1 cells")
    assert compare.failing(few, 1, ["missing"]) == (True, "--fail-on missing: 1 of 2 cells; 1 could not be judged")
    with pytest.raises(BadInput, match=r"none of 1 cells can be judged \(too few runs\)"):
        compare.failing(few, 0, ["slower"])


# --- how it reads ---


def test_csv_and_markdown_say_the_same() -> None:
    found = judge(side("a", 1e-3, 1.01e-3, name="x[a|b]"), side("a", 2e-3, 2.02e-3, name="x[a|b]"))
    header, line = compare_text.csv_text(found).splitlines()
    fields = dict(zip(header.split(","), line.split(","), strict=True))
    assert float(fields["ratio"]) == found[0].ratio and fields["verdict"] == "slower"
    page = compare_text.markdown(found, "title", ["decided"])
    assert page.startswith("### title\n\n- decided\n\n| cell | base |")
    assert "2.0000" in page and "x[a\\|b]" in page and "| slower |" in page
    assert "|" not in compare_text.markdown([], "title", ["decided"])


def test_narrow_lines_keep_what_decides() -> None:
    (line,) = compare_text.lines(judge(side("a", 1.0), side("a", 2.0)), narrow=True)
    assert compare_text.NARROW == ("cell", "ratio", "95% interval", "verdict")
    assert line == ("x[1]", "2.0000", "too few runs", "too few runs")


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        *((2.0, "median", "2 s"), (1.5e-3, "median", "1.5 ms"), (2.5e-6, "min", "2.5 µs"), (3e-9, "mean", "3 ns")),
        *(
            (7200.0, "median", "7200 s"),
            (1234567.0, "tokens_per_s", "1.235 M/s"),
            (4.28e12, "bytes_per_s", "4.28 TB/s"),
        ),
        *((129e9, "device_used_bytes", "129 GB"), (0.9137, "of_ceiling", "91.37%"), (0.0125, "energy_j", "12.5 mJ")),
        *((30.0, "rounds", "30"), (53.0, "temperature_c", "53 °C"), (1.98e9, "sm_clock_hz", "1.98 GHz")),
    ],
)
def test_quantity(value: float, metric: str, text: str) -> None:
    assert compare_text.quantity(value, metric) == text
