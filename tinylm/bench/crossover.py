"""From which length on one of two curves is the lower one, between the lengths that were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping


def crossover(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float] | None:
    """(length, value) from which on `ours` is at most `theirs`, at all lengths that both have.

    ours, theirs: length -> value, both positive. Between two lengths each is a line on logarithmic axes. The shortest
    length where `ours` is never the higher one, so that they cross there or before; None where it is at the longest,
    and where fewer than two lengths are in both.
    """
    lengths = sorted(ours.keys() & theirs.keys())
    lost = [n for n in lengths if ours[n] > theirs[n]]
    if len(lengths) < 2 or lost[-1:] == lengths[-1:]:
        return None
    if not lost:
        return lengths[0], ours[lengths[0]]
    low = lost[-1]
    high = lengths[lengths.index(low) + 1]
    gaps = [math.log(ours[n] / theirs[n]) for n in (low, high)]  # above 0, then at most 0
    share = gaps[0] / (gaps[0] - gaps[1])
    length, value = (
        (math.log(b) - math.log(a)) * share + math.log(a) for a, b in ((low, high), (ours[low], ours[high]))
    )
    return math.exp(length), math.exp(value)
