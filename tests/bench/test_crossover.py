"""Where one measured curve comes below another."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench.crossover import crossover

CURVES = st.dictionaries(st.integers(1, 2**20), st.floats(1e-6, 1e3), min_size=2, max_size=8)


def between(curve: dict[int, float], length: float) -> float:
    """The curve's value at a length, by a line on logarithmic axes."""
    low = max(n for n in curve if n <= length * (1 + 1e-12))
    high = min(n for n in curve if n >= length * (1 - 1e-12))
    if low == high:
        return curve[low]
    share = math.log(length / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(curve[low]) + share * math.log(curve[high]))


@given(CURVES, st.data())
def test_from_there_on_and_not_before_ours_is_the_lower_curve(ours: dict[int, float], data: st.DataObject) -> None:
    theirs = {n: data.draw(st.floats(1e-6, 1e3)) for n in ours}
    found = crossover(ours, theirs)
    lengths = sorted(ours)
    if found is None:
        assert ours[lengths[-1]] > theirs[lengths[-1]]
        return
    length, value = found
    assert all(ours[n] <= theirs[n] for n in lengths if n >= length * (1 + 1e-9))
    if length == lengths[0]:
        assert value == ours[lengths[0]]
        return
    assert ours[max(n for n in lengths if n < length)] > theirs[max(n for n in lengths if n < length)]
    # Logarithms of numbers to 2e6, divided by a gap of them: a few eps of their size.
    assert value == pytest.approx(between(ours, length), rel=1e-9)
    assert value == pytest.approx(between(theirs, length), rel=1e-6)


@given(st.floats(2, 1e4), st.floats(1e-6, 1), st.floats(0.1, 3))
def test_lines_cross_where_they_cross(at: float, value: float, steepness: float) -> None:
    """A constant time, and one that grows as a power of the length."""
    lengths = [1, 7, 300, 20_000]
    grown = {n: value * (n / at) ** steepness for n in lengths}
    assert crossover(dict.fromkeys(lengths, value), grown) == pytest.approx((at, value), rel=1e-6)


@given(CURVES)
def test_equal_curves_cross_at_the_first_length_and_what_is_not_in_both_does_not_count(ours: dict[int, float]) -> None:
    first = min(ours)
    assert crossover(ours, ours) == (first, ours[first])
    assert crossover(ours, ours | {2**21: 1e-9}) == (first, ours[first])
    assert crossover(ours, {first: 1.0}) is None
    assert crossover({}, {}) is None
