"""The statistics: against scipy and brute force, and in small simulations whose outcome is fixed by a seed."""

import itertools
import math
import statistics
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t, ttest_ind

from tinylm.bench import stats

SECONDS = st.floats(1e-7, 10)
LOGS = st.floats(-16, 3)
RATIOS = st.lists(st.floats(-0.7, 0.7), min_size=1, max_size=40)
SIDE = st.lists(LOGS, min_size=2, max_size=6, unique=True)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def drifting(rounds: int, correlation: float, spread: float, noise: np.random.Generator) -> np.ndarray:
    """Log ratios around 0 that resemble their neighbours; 1 of 25 is hit by something else."""
    steps = noise.normal(size=rounds)
    for i in range(1, rounds):
        steps[i] = correlation * steps[i - 1] + math.sqrt(1 - correlation**2) * steps[i]
    return spread * (steps + (noise.random(rounds) < 0.04) * noise.normal(0, 10, size=rounds))


# --- stopping ---


@given(st.lists(SECONDS, min_size=3, max_size=30))
def test_interval_of_the_median_is_students_over_blocks(blocks: list[float]) -> None:
    interval = stats.median_interval(blocks) or (0, 0)
    centre, error = statistics.fmean(blocks), statistics.stdev(blocks) / math.sqrt(len(blocks))
    # Rounding of the mean alone gives equal blocks a spread of an ulp.
    assert interval == pytest.approx((t.interval(0.95, len(blocks) - 1, centre, error)) if error else (centre, centre))
    assert stats.relative_width(blocks) == pytest.approx((interval[1] - interval[0]) / centre, abs=1e-12)


@given(st.lists(SECONDS, min_size=3, max_size=30), st.floats(1e-3, 1e3))
def test_relative_width_has_no_unit(blocks: list[float], scale: float) -> None:
    scaled = stats.relative_width([scale * block for block in blocks])
    assert scaled == pytest.approx(stats.relative_width(blocks), rel=1e-6, abs=1e-12)


def test_two_blocks_have_no_interval() -> None:
    assert stats.median_interval([1.0, 1.1]) is None and stats.relative_width([1.0, 1.1]) is None
    assert stats.relative_width([2.0, 2.0, 2.0]) == 0


def test_interval_of_the_median_covers_it() -> None:
    """Skewed samples, correlated within their block, 12 blocks of 21: 95% intervals."""
    noise = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        medians = np.median(np.exp(noise.normal(size=(12, 21)) + noise.normal(0, 0.3, size=(12, 1))), axis=1)
        low, high = stats.median_interval(medians.tolist()) or (0, 0)
        covered += low <= 1 <= high
    # The mean of medians of 21 lies a little above the median, by less than the interval's width.
    assert 0.91 <= covered / 400 <= 0.98


# --- pairs ---


@given(RATIOS)
def test_hodges_lehmann_is_the_median_of_all_walsh_averages(values: list[float]) -> None:
    averages = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2)]
    assert stats.hodges_lehmann(values) == pytest.approx(statistics.median(averages), abs=1e-15)


@given(RATIOS, st.floats(-1, 1))
def test_hodges_lehmann_follows_shift_and_sign(values: list[float], shift: float) -> None:
    estimate = stats.hodges_lehmann(values)
    assert stats.hodges_lehmann([value + shift for value in values]) == pytest.approx(estimate + shift, abs=1e-12)
    assert stats.hodges_lehmann([-value for value in values]) == -estimate


def test_hodges_lehmann_of_many_values_and_of_outliers() -> None:
    values = np.random.default_rng(1).normal(size=2000)
    averages = (values[:, None] + values[None])[np.triu_indices(2000)] / 2
    # A twentieth of the estimate's own standard error, 1.02 / sqrt(2000).
    assert stats.hodges_lehmann(values.tolist()) == pytest.approx(float(np.median(averages)), abs=0.0012)
    assert abs(stats.hodges_lehmann([*values[:80].tolist(), *[1e6] * 20])) < 1


@given(st.lists(st.floats(-0.7, 0.7), min_size=5, max_size=40), st.sampled_from([0.0, 0.005, 0.1]))
def test_swapping_a_pair_inverts_it(ratios: list[float], threshold: float) -> None:
    there, back = stats.paired(ratios, threshold), stats.paired([-ratio for ratio in ratios], threshold)
    assert there == stats.paired(ratios, threshold)
    assert there.low is not None and there.high is not None and back.low is not None and back.high is not None
    assert there.low <= there.ratio <= there.high
    assert (there.ratio, there.low, there.high) == pytest.approx((1 / back.ratio, 1 / back.high, 1 / back.low))
    swapped = {"slower": "faster", "faster": "slower"}
    if min(abs(abs(math.log(end)) - math.log1p(threshold)) for end in (there.low, there.high)) > 1e-12:
        assert back.verdict == swapped.get(there.verdict, there.verdict)


def test_pairs_of_few_or_equal_rounds() -> None:
    assert stats.paired([0.1] * 4, 0.005) == stats.Paired(math.exp(0.1), None, None, "inconclusive")
    assert stats.paired([0.0] * 9, 0.005) == stats.Paired(1.0, 1.0, 1.0, "equivalent")
    assert stats.paired([0.1] * 9, 0.005).verdict == "slower"
    for bad in ([], [0.1, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="expected one finite number or more"):
            stats.paired(bad, 0.005)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.03, 1.05, "slower"),
        (1.02, 1.05, "inconclusive"),
        (0.9, 0.98, "faster"),
        (0.97, 0.99, "inconclusive"),
        (0.99, 1.01, "equivalent"),
        (0.5, 2.0, "inconclusive"),
    ],
)
def test_verdict_of_an_interval(low: float, high: float, verdict: str) -> None:
    assert stats.verdict(low, high, 0.02) == verdict


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6])
def test_identical_code_is_not_called_different_and_one_percent_is(correlation: float) -> None:
    noise = np.random.default_rng(2)
    same, slowed = Counter[str](), Counter[str]()
    for seed in range(60):
        placed = noise.normal(0, 0.0008)  # what the place in memory does to a pair for as long as it lasts
        rounds = drifting(80, correlation, 0.004, noise) + placed
        same[stats.paired(rounds.tolist(), 0.005, seed=seed).verdict] += 1
        slowed[stats.paired((rounds + math.log(1.01)).tolist(), 0.005, seed=seed).verdict] += 1
    assert same["slower"] + same["faster"] == 0 and same["equivalent"] > 48
    assert slowed["slower"] >= 57 and not slowed["faster"]


@pytest.mark.parametrize(("rounds", "correlation", "least"), [(8, 0.0, 0.92), (30, 0.3, 0.91), (60, 0.6, 0.86)])
def test_paired_interval_covers_the_truth(rounds: int, correlation: float, least: float) -> None:
    noise = np.random.default_rng(3)
    covered = 0
    for seed in range(150):
        found = stats.paired(drifting(rounds, correlation, 0.01, noise).tolist(), 0.005, seed=seed)
        assert found.low is not None and found.high is not None
        covered += found.low <= 1 <= found.high
    assert covered >= least * 150


# --- runs ---


@given(SIDE, SIDE)
def test_welch_is_scipys_test_on_the_same_values(base: list[float], new: list[float]) -> None:
    found = stats.welch(base, new)
    assert found is not None
    expected = ttest_ind(new, base, equal_var=False)
    interval = expected.confidence_interval(0.95)
    # Both compute in fp64: the means of logs up to 16 are off by a few ulps, and the interval is at most
    # t = 12.7 standard errors wide.
    assert found.interval() == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)
    if found.error > 1e-9:
        assert found.p() == pytest.approx(expected.pvalue, rel=1e-5, abs=1e-9)


@given(SIDE, SIDE, st.floats(0, 3))
def test_p_of_a_margin_agrees_with_the_interval(base: list[float], new: list[float], margin: float) -> None:
    found = stats.welch(base, new)
    assert found is not None
    low, high = found.interval()
    beyond = max(low, -high) - margin
    if abs(beyond) > 1e-9:
        assert (found.p(margin) < 0.05) == (beyond > 0)
    assert found.p(margin) >= found.p()


@given(SIDE, SIDE, st.floats(1e-6, 0.1))
def test_a_floor_only_widens(base: list[float], new: list[float], floor: float) -> None:
    free, held = stats.welch(base, new), stats.welch(base, new, floor)
    assert free is not None and held is not None
    assert held.estimate == free.estimate
    assert held.error >= max(free.error, floor * math.sqrt(1 / len(base) + 1 / len(new)) * (1 - 1e-9))


def test_values_without_spread() -> None:
    assert stats.welch([1.0], [1.0, 2.0]) is None
    same = stats.welch([0.1, 0.1], [0.1, 0.1, 0.1])
    assert same is not None and same.interval() == (0, 0) and same.p() == 1
    other = stats.welch([0.1, 0.1], [0.2, 0.2])
    assert other is not None and other.p() == 0 and other.p(0.2) == 1


@given(P_VALUES)
def test_adjusted_p_values_are_the_step_up_procedure(p_values: list[float]) -> None:
    adjusted = stats.adjusted(p_values)
    assert all(raw <= q <= 1 for raw, q in zip(p_values, adjusted, strict=True))
    ranked = [q for _, q in sorted(zip(p_values, adjusted, strict=True))]
    assert ranked == sorted(ranked)
    for level in (0.05, 0.2):
        # Benjamini and Hochberg's own words: all up to the largest k with p_(k) <= k / m * level.
        passing = [k for k, p in enumerate(sorted(p_values), 1) if p <= k / len(p_values) * level * (1 - 1e-12)]
        assert sum(q <= level for q in adjusted) >= max(passing, default=0)
        assert sum(q <= level * (1 - 1e-9) for q in adjusted) <= max(passing, default=0)


@given(P_VALUES, st.randoms(use_true_random=False))
def test_order_of_the_cells_does_not_matter(p_values: list[float], random: object) -> None:
    order = sorted(range(len(p_values)), key=lambda i: random.random())  # type: ignore[attr-defined]
    assert stats.adjusted([p_values[i] for i in order]) == [stats.adjusted(p_values)[i] for i in order]
    assert stats.adjusted([]) == []
