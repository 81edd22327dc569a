"""Comparison: the run is the unit, Welch's interval, no verdict where there is no ground for one."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from tinylm.bench import compare
from tinylm.bench.compare import Side, welch
from tinylm.bench.results import BadInput

TIMES = st.lists(st.floats(1e-7, 10), min_size=2, max_size=6, unique=True)


def side(label: str, *medians: float, metric: str = "median", name: str = "test_x[1]") -> Side:
    rows: list[dict[str, Any]] = [
        {"label": label, "suite": "main", "run": str(i), "experiment": "x", "outcome": "measured"}
        | {"name": name, "fullname": f"folder{label}/bench_x.py::{name}", metric: value}
        for i, value in enumerate(medians)
    ]
    return compare.side(label, rows)


@given(TIMES, TIMES)
def test_interval_is_that_of_welchs_t_test(base: list[float], new: list[float]) -> None:
    logs = [[math.log(value) for value in values] for values in (base, new)]
    difference, interval = welch(*logs)
    expected = ttest_ind(logs[1], logs[0], equal_var=False).confidence_interval(0.95)
    assert interval is not None
    # Both compute in fp64: the means of logs up to 16 are off by a few ulps, and the interval is at most
    # t = 12.7 standard errors wide.
    assert interval == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)
    assert interval[0] <= difference <= interval[1]


@given(TIMES, TIMES)
def test_swapping_the_sides_inverts_the_ratio(base: list[float], new: list[float]) -> None:
    (there,), (back,) = (
        compare.compare(side("a", *first), side("a", *second)) for first, second in ((base, new), (new, base))
    )
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.low is not None and back.high is not None
    assert there.low == pytest.approx(1 / back.high)
    assert there.ratio == pytest.approx(there.new_value / there.base_value)


@pytest.mark.parametrize(
    ("new", "threshold", "verdict"),
    [
        ((1.10, 1.11, 1.09), 0.0, "slower"),
        ((0.90, 0.91, 0.89), 0.0, "faster"),
        ((0.98, 1.02, 1.01), 0.0, "unclear"),
        ((1.01, 1.011, 1.009), 0.05, "within threshold"),
        ((1.10, 1.11, 1.09), 0.5, "within threshold"),
        ((0.7, 1.5, 1.2), 0.02, "unclear"),
    ],
)
def test_verdicts(new: tuple[float, ...], threshold: float, verdict: str) -> None:
    (found,) = compare.compare(side("a", 1.0, 1.002, 0.998), side("a", *new), threshold=threshold)
    assert found.verdict == verdict


def test_one_run_gives_a_ratio_and_no_interval() -> None:
    base, new = side("a", 1.0), side("a", 2.0, 2.1)
    (found,) = compare.compare(base, new)
    assert (found.low, found.high, found.verdict) == (None, None, "too few runs")
    assert found.ratio == pytest.approx(math.sqrt(2.0 * 2.1))
    assert "too few runs" in compare.summary(base, new, [found], "median")


def test_across_labels_there_are_ratios_without_verdicts() -> None:
    base, new = side("a", 1.0, 1.1), side("b", 5.0, 5.1)
    (found,) = compare.compare(base, new)
    assert found.verdict == "other label" and found.ratio > 4
    assert "no verdicts" in compare.summary(base, new, [found], "median")


def test_without_a_label_there_is_no_verdict() -> None:
    base, new = side("unlabelled", 1.0, 1.1), side("unlabelled", 5.0, 5.1)
    assert compare.compare(base, new)[0].verdict == "no label"


def test_a_side_of_several_labels_is_refused() -> None:
    with pytest.raises(BadInput, match="several labels"):
        compare.side("results", side("a", 1.0).rows + side("b", 1.0).rows)


@pytest.mark.parametrize(
    ("metric", "verdict"),
    [("tokens_per_s", "faster"), ("of_ceiling", "faster"), ("energy_j", "more"), ("mean", "slower")],
)
def test_metrics_have_their_own_direction(metric: str, verdict: str) -> None:
    base, new = side("a", 1.0, 1.01, metric=metric), side("a", 2.0, 2.01, metric=metric)
    assert compare.compare(base, new, metric)[0].verdict == verdict


def test_equal_counts_need_no_spread() -> None:
    (same,) = compare.compare(side("a", 64, 64, metric="bytes"), side("a", 64, 64, metric="bytes"), "bytes")
    assert (same.ratio, same.low, same.high, same.verdict) == (1, 1, 1, "within threshold")


def test_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(BadInput, match="expected one of median"):
        compare.compare(side("a", 1.0), side("a", 1.0), "speed")


def test_cells_of_one_side_are_counted_and_failed_ones_left_out() -> None:
    base, new = side("a", 1.0, name="test_x[1]"), side("a", 1.0, name="test_x[2]")
    assert not compare.compare(base, new)
    assert compare.unpaired(base, new, "median") == (1, 1)
    base.rows[0]["outcome"] = "failed"
    assert compare.unpaired(base, new, "median") == (0, 1)


def test_csv_and_markdown_say_the_same() -> None:
    found = compare.compare(side("a", 1e-3, 1.1e-3, name="x[a|b]"), side("a", 2e-3, 2.2e-3, name="x[a|b]"))
    header, line = compare.csv_text(found).splitlines()
    fields = dict(zip(header.split(","), line.split(","), strict=True))
    assert float(fields["ratio"]) == found[0].ratio and fields["verdict"] == "slower"
    page = compare.markdown(found, "caption")
    assert "2.0000" in page and "x[a\\|b]" in page and page.endswith("caption\n")


@pytest.mark.parametrize(("seconds", "text"), [(2.0, "2 s"), (1.5e-3, "1.5 ms"), (2.5e-6, "2.5 µs"), (3e-9, "3 ns")])
def test_quantity(seconds: float, text: str) -> None:
    assert compare.quantity(seconds, "median") == text
    assert compare.quantity(1234567.0, "tokens_per_s") == "1.235e+06"
