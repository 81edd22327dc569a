"""Samples in blocks: taken in turn, until the median is known well enough, at a steady clock.

A block is a few samples of one sampler, next to each other in time; its median is one value for the statistics.
Several samplers take their blocks in a new random order each round, so that drift of the machine falls on all alike.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tinylm.bench import stats
from tinylm.bench.timing import Limits, Sampler
from tinylm.bench.wall import Wall
from tinylm.bench.watch import Block, Watch

_now = time.perf_counter

# Fewest blocks of an interval: its width is otherwise luck. Of peers, whose ratios come with a bootstrap's interval.
MIN_BLOCKS, MIN_ROUNDS = 5, 8
# Most samples of a block: so many fit between two looks at the device.
MOST_SAMPLES = 1000
# A block takes at most this share of a cell's time, and of its samples, so that there are enough of them.
BLOCK_SHARE = 1 / 20
# Pauses before a block is taken again because the clock was low; no more than these for one sampler.
PAUSES_S = (0.05, 0.1, 0.2)


@dataclass
class Samples:
    """Blocks in the order in which they were taken, why sampling stopped, and the blocks at too low a clock.

    flagged: those that were taken again, and those that were kept although they were slow, with kept = True.
    """

    blocks: list[Block] = field(default_factory=list)
    stop_reason: str = ""
    flagged: list[tuple[Block, bool]] = field(default_factory=list)
    calls: int = 1
    queued: str | None = None
    failure: Exception | None = None  # that ended it

    @property
    def seconds(self) -> list[float]:
        return [second for block in self.blocks for second in block.seconds]

    @property
    def medians(self) -> list[float]:
        return [block.median for block in self.blocks]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def width(self) -> float | None:
        """Of the median's confidence interval, relative; None where there are too few blocks."""
        return stats.relative_width(self.medians) if len(self.blocks) >= MIN_BLOCKS else None


@contextmanager
def _collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def collect(
    samplers: Sequence[Sampler],
    limits: Limits,
    watch: Watch | None = None,
    wall: Wall | None = None,
    seed: int = 0,
    sleep: Callable[[float], Any] = time.sleep,
) -> list[Samples]:
    """Take blocks of each, round after round, until the limits are met; the time is that of all together.

    Of several samplers, each one's median, and each one's ratio to the first's, must be known to the width. seed: of
    the order within the rounds.
    """
    watch, wall, order = watch or Watch(), wall or Wall(), random.Random(seed)
    taken = [Samples(calls=sampler.calls, queued=sampler.queued) for sampler in samplers]
    if not samplers:
        return taken
    with _collector_off():
        count, active = MOST_SAMPLES, list(range(len(samplers)))

        def attempt(i: int, step: Callable[[], Any]) -> Any:
            """One sampler's step; what fails drops out, and the others go on."""
            try:
                return step()
            except Exception as trouble:
                if len(samplers) == 1:
                    raise
                taken[i].failure = trouble
                active.remove(i)
                return None

        with wall.phase("warm-up"):
            for i in list(active):
                if (period := attempt(i, partial(warm, samplers[i], limits))) is not None:
                    # As many samples of each, so that the medians of a round are comparable.
                    count = min(count, _block_samples(period, limits))
        deadline = _now() + limits.seconds * len(samplers)
        reason = ""
        while active and not reason:
            for i in order.sample(active, len(active)):
                left = limits.max_samples - len(taken[i].seconds)
                attempt(i, partial(_take, samplers[i], min(count, left), taken[i], limits, watch, wall, sleep))
            with wall.phase("statistics"):
                reason = _stop([taken[i] for i in active], limits, deadline) if active else ""
    for samples in taken:
        samples.stop_reason = reason
    return taken


def _block_samples(period: float, limits: Limits) -> int:
    """How many samples make a block: as many as fit into its share of time and samples, at least one."""
    by_time = limits.seconds * BLOCK_SHARE / max(period, 1e-9)
    return max(1, math.floor(min(by_time, limits.max_samples * BLOCK_SHARE)))


def _stop(taken: list[Samples], limits: Limits, deadline: float) -> str:
    fewest = min(len(samples.seconds) for samples in taken)
    if fewest >= limits.max_samples:
        return "samples"
    if fewest < limits.min_samples or (len(taken) > 1 and len(taken[0].blocks) < MIN_ROUNDS):
        return ""
    widths = [samples.width for samples in taken]
    first = taken[0].medians
    for samples in taken[1:]:
        rounds = [new / base for new, base in zip(samples.medians, first, strict=True) if base]
        widths.append(stats.relative_width(rounds) if len(rounds) >= MIN_BLOCKS else None)
    if all(width is not None and width <= limits.width for width in widths):
        return "width"
    return "seconds" if _now() > deadline else ""


def _take(
    sampler: Sampler,
    count: int,
    samples: Samples,
    limits: Limits,
    watch: Watch,
    wall: Wall,
    sleep: Callable[[float], Any],
) -> None:
    """One block; taken again after a pause where the clock was low."""
    while True:
        with wall.phase("queue"):
            watch.start()
            block = watch.stop(sampler.take(count, watch.meanwhile))
        wall.shift("queue", "flush", sampler.flush_s * count)
        wall.shift("queue", "work", sum(block.seconds) * sampler.calls)
        steady = watch.steady
        if steady is None or block.clock_hz is None:
            break
        low, repeats = steady.too_low(block.clock_hz, limits.clock_share), len(samples.flagged)
        if not low or repeats >= len(PAUSES_S):
            steady.add(block.clock_hz)
            if low:
                samples.flagged.append((block, True))
            break
        samples.flagged.append((block, False))
        with wall.phase("pause"):
            sleep(PAUSES_S[repeats])
    samples.blocks.append(block)


def warm(sampler: Sampler, limits: Limits) -> float:
    """Sample, discarding what is said, until the clocks have risen and lazy work is done; the wall time of a sample.

    The work has been run several times before, by its proof: of long work one sample will do, or none.
    """
    if sampler.period is not None and sampler.period >= 10 * limits.warmup_seconds:
        return sampler.period
    start = _now()
    period = 0.0
    for call in range(10_000):
        elapsed = _now() - start
        enough = call >= limits.warmup_calls or elapsed >= 10 * limits.warmup_seconds
        if call and enough and elapsed >= limits.warmup_seconds:
            break
        sampler.take(1, lambda: None)
        period = _now() - start - elapsed
    return period
