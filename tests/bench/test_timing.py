"""Sampling, on a clock that the work itself moves, so that nothing here depends on the machine's speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench import timing
from tinylm.bench.timing import Limits, collect


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.calls += 1

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(timing, "time", fake)
    return fake


@pytest.mark.parametrize("seconds", [1e-7, 3e-6, 1e-4, 0.5])
def test_host_gives_seconds_per_call(clock: FakeTime, seconds: float) -> None:
    sample = timing.host(clock.work(seconds))
    assert sample() == pytest.approx(seconds)


def test_host_repeats_short_work_within_a_sample_and_long_work_never(clock: FakeTime) -> None:
    short, long = clock.work(1e-6), clock.work(timing.HOST_SAMPLE_S * 2)
    sample = timing.host(short)
    before = clock.calls
    sample()
    assert clock.calls - before >= timing.HOST_SAMPLE_S / 1e-6
    sample = timing.host(long)
    before = clock.calls
    sample()
    assert clock.calls - before == 1


def test_host_waits_for_the_device_before_and_after(clock: FakeTime) -> None:
    log: list[str] = []
    work = clock.work(1.0)

    def logged() -> None:
        work()
        log.append("work")

    sample = timing.host(logged, lambda: log.append("sync"))
    log.clear()
    sample()
    assert log == ["sync", "work", "sync"]


def fixed(clock: FakeTime, seconds: float, name: str, log: list[str]) -> timing.Sampler:
    def sample() -> float:
        clock.now += seconds
        log.append(name)
        return seconds

    return sample


def test_collect_stops_at_the_most_samples(clock: FakeTime) -> None:
    (samples,) = collect([fixed(clock, 1e-6, "a", [])], Limits(2, 7, 1.0))
    assert (len(samples.seconds), samples.stop_reason) == (7, "samples")


def test_collect_stops_when_time_is_up_but_not_before_the_fewest_samples(clock: FakeTime) -> None:
    (samples,) = collect([fixed(clock, 10.0, "a", [])], Limits(3, 50, 1.0))
    assert (samples.seconds, samples.stop_reason) == ([10.0] * 3, "time")
    assert samples.median == 10.0


def test_peers_are_sampled_in_turn_and_the_order_rotates(clock: FakeTime) -> None:
    log: list[str] = []
    limits = Limits(3, 3, 1.0, warmup_calls=0, warmup_seconds=0.0)
    collect([fixed(clock, 0.1, name, log) for name in "abc"], limits)
    assert "".join(log) == "abc" + "bca" + "cab"


@given(st.integers(1, 20), st.integers(0, 20), st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=4))
def test_every_peer_gets_as_many_samples_as_the_others(low: int, more: int, times: list[float]) -> None:
    clock = FakeTime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time", clock)
        taken = collect([fixed(clock, t, "x", []) for t in times], Limits(low, low + more, 0.5))
    counts = {len(samples.seconds) for samples in taken}
    assert len(counts) == 1 and low <= counts.pop() <= low + more
    assert all(samples.stop_reason in ("samples", "time") for samples in taken)


@pytest.mark.parametrize(("low", "high", "seconds"), [(0, 1, 1.0), (5, 4, 1.0), (1, 1, 0.0)])
def test_limits_that_cannot_be_met_are_refused(low: int, high: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        Limits(low, high, seconds)


def test_a_mode_needs_its_device() -> None:
    with pytest.raises(timing.TimingError, match="needs a CUDA device"):
        timing.sampler("cold", lambda: None)
    with pytest.raises(timing.TimingError, match="expected one of cold, graph, hot, host"):
        timing.sampler("warm", lambda: None)
