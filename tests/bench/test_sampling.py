"""Blocks, stopping and slow clocks, on a clock that the samplers themselves move."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench import sampling
from tinylm.bench.sampling import collect
from tinylm.bench.timing import Limits, Meanwhile, Sampler
from tinylm.bench.wall import Wall
from tinylm.bench.watch import Block, Steady, Watch


class FakeTime:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(sampling, "_now", fake)
    return fake


def sampler(clock: FakeTime, seconds: Callable[[], float], log: list[str] | None = None, name: str = "") -> Sampler:
    def take(count: int, meanwhile: Meanwhile) -> list[float]:
        found = [seconds() for _ in range(count)]
        clock.now += sum(found)
        meanwhile()
        if log is not None:
            log.append(name)
        return found

    return Sampler(take)


def test_a_steady_median_stops_at_the_width(clock: FakeTime) -> None:
    (samples,) = collect([sampler(clock, lambda: 1e-3)], Limits(5, 1000, 10.0, width=0.005))
    assert samples.stop_reason == "width" and samples.width == 0.0
    assert len(samples.blocks) == sampling.MIN_BLOCKS


@given(st.integers(0, 1000), st.sampled_from([0.002, 0.01, 0.05]))
def test_the_width_that_stopped_is_the_width_that_was_asked_for(seed: int, width: float) -> None:
    clock, noise = FakeTime(), random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_now", clock)
        limits = Limits(5, 2000, 50.0, width=width)
        (samples,) = collect([sampler(clock, lambda: 0.01 * noise.lognormvariate(0, 0.02))], limits)
    assert samples.width is not None and (samples.stop_reason != "width" or samples.width <= width)
    assert samples.median == statistics.median(samples.seconds)
    assert len(samples.seconds) == sum(len(block.seconds) for block in samples.blocks)


def test_the_most_samples_end_it(clock: FakeTime) -> None:
    noise = random.Random(0)
    (samples,) = collect([sampler(clock, lambda: noise.uniform(1e-6, 1e-3))], Limits(2, 47, 1.0))
    assert (len(samples.seconds), samples.stop_reason) == (47, "samples")


def test_the_time_ends_it_but_not_before_the_fewest_samples(clock: FakeTime) -> None:
    (samples,) = collect([sampler(clock, lambda: 10.0)], Limits(3, 50, 1.0))
    assert (samples.seconds, samples.stop_reason) == ([10.0] * 3, "seconds")
    assert samples.width is None  # of three blocks it would be luck


def test_peers_take_their_blocks_in_a_new_order_each_round(clock: FakeTime) -> None:
    log: list[str] = []
    limits = Limits(6, 6, 100.0, warmup_calls=1, warmup_seconds=0.0)
    collect([sampler(clock, lambda: 5.0, log, name) for name in "abc"], limits, seed=1)
    rounds = ["".join(log[3 + 3 * i : 6 + 3 * i]) for i in range(6)]
    assert all(sorted(turn) == list("abc") for turn in rounds) and len(set(rounds)) > 1


@given(st.integers(1, 20), st.integers(0, 20), st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=4))
def test_every_peer_gets_as_many_blocks_and_samples(low: int, more: int, times: list[float]) -> None:
    clock = FakeTime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_now", clock)
        taken = collect([sampler(clock, lambda t=t: t) for t in times], Limits(low, low + more, 0.5))  # type: ignore[misc]
    shapes = {tuple(len(block.seconds) for block in samples.blocks) for samples in taken}
    assert len(shapes) == 1 and low <= sum(shapes.pop()) <= low + more


class Clocked(Watch):
    """A device whose clock is read from a list, block after block."""

    def __init__(self, *clocks: float) -> None:
        self.steady = Steady()
        self.steady.add(2e9)
        self._clocks = iter(clocks)

    def stop(self, seconds: list[float]) -> Block:
        return Block(seconds, clock_hz=next(self._clocks, 2e9))


def test_a_block_at_a_low_clock_is_flagged_and_taken_again(clock: FakeTime) -> None:
    pauses: list[float] = []
    watch = Clocked(2e9, 1e9, 1.2e9, 2e9)
    (samples,) = collect([sampler(clock, lambda: 1e-3)], Limits(5, 50, 1.0, width=0.01), watch, sleep=pauses.append)
    assert [(block.clock_hz, kept) for block, kept in samples.flagged] == [(1e9, False), (1.2e9, False)]
    assert pauses == list(sampling.PAUSES_S[:2]) and pauses[0] < pauses[1]
    assert all(block.clock_hz == 2e9 for block in samples.blocks)


def test_after_a_bounded_number_of_repeats_slow_blocks_are_kept_and_say_so(clock: FakeTime) -> None:
    watch = Clocked(*[1e9] * 500)
    (samples,) = collect([sampler(clock, lambda: 1e-3)], Limits(5, 50, 1.0), watch, sleep=lambda _: None)
    assert [kept for _, kept in samples.flagged][: len(sampling.PAUSES_S)] == [False] * len(sampling.PAUSES_S)
    kept = [block for block, kept in samples.flagged if kept]
    assert kept and all(block in samples.blocks for block in kept)


def test_the_steady_clock_becomes_that_of_the_last_blocks() -> None:
    steady = Steady()
    assert not steady.too_low(1.0, 0.75)
    steady.add(2e9)
    assert steady.too_low(1.4e9, 0.75) and not steady.too_low(1.6e9, 0.75)
    for _ in range(100):
        steady.add(1.4e9)
    assert not steady.too_low(1.4e9, 0.75)


def test_the_wall_time_of_a_block_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinylm.bench import wall as module

    clock = FakeTime()
    monkeypatch.setattr(module, "_now", clock)
    monkeypatch.setattr(sampling, "_now", clock)

    def take(count: int, meanwhile: Meanwhile) -> list[float]:
        clock.now += count * 1.75
        return [1.0] * count

    wall = Wall()
    limits = Limits(4, 4, 1.0, warmup_calls=1, warmup_seconds=0.0)
    collect([Sampler(take, flush_s=0.5)], limits, wall=wall)
    assert wall.seconds["work"] == 4.0 and wall.seconds["flush"] == 2.0
    assert wall.seconds["queue"] == pytest.approx(1.0) and wall.seconds["warm-up"] == 1.75


def test_a_peer_that_fails_drops_out_and_the_others_go_on(clock: FakeTime) -> None:
    taken = 0

    def breaks(count: int, meanwhile: Meanwhile) -> list[float]:
        nonlocal taken
        taken += count
        if taken > 3:
            raise ValueError("broken")
        return [1e-3] * count

    limits = Limits(5, 200, 1.0, width=0.01, warmup_calls=1, warmup_seconds=0.0)
    good, bad = collect([sampler(clock, lambda: 1e-3), Sampler(breaks)], limits)
    assert str(bad.failure) == "broken" and good.failure is None
    assert good.stop_reason == "width" and len(good.blocks) >= sampling.MIN_BLOCKS
    with pytest.raises(ValueError, match="broken"):
        collect([Sampler(breaks)], limits)


def test_peers_take_enough_rounds_for_their_verdict(clock: FakeTime) -> None:
    both = collect([sampler(clock, lambda: 1e-3) for _ in range(2)], Limits(1, 500, 1.0, width=0.01))
    assert all(len(samples.blocks) >= sampling.MIN_ROUNDS for samples in both)
