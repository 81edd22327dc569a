"""Samplers, on a clock that the work itself moves, so that nothing here depends on the machine's speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tinylm.bench import timing
from tinylm.bench.timing import Limits


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
    monkeypatch.setattr(timing, "_now", fake.perf_counter)
    return fake


@pytest.mark.parametrize("seconds", [1e-7, 3e-6, 1e-4, 0.5])
def test_host_gives_seconds_per_call(clock: FakeTime, seconds: float) -> None:
    sample = timing.host(clock.work(seconds))
    assert sample.take(3, lambda: None) == pytest.approx([seconds] * 3)


def test_host_repeats_short_work_within_a_sample_and_long_work_never(clock: FakeTime) -> None:
    short, long = clock.work(1e-6), clock.work(timing.HOST_SAMPLE_S * 2)
    sample = timing.host(short)
    before = clock.calls
    sample.take(1, lambda: None)
    assert clock.calls - before >= timing.HOST_SAMPLE_S / 1e-6
    sample = timing.host(long)
    before = clock.calls
    sample.take(1, lambda: None)
    assert clock.calls - before == 1


def test_host_waits_for_the_device_before_and_after(clock: FakeTime) -> None:
    log: list[str] = []
    work = clock.work(1.0)

    def logged() -> None:
        work()
        log.append("work")

    sample = timing.host(logged, lambda: log.append("sync"))
    log.clear()
    sample.take(1, lambda: None)
    assert log == ["sync", "work", "sync"]


@pytest.mark.parametrize(("low", "high", "seconds"), [(0, 1, 1.0), (5, 4, 1.0), (1, 1, 0.0)])
def test_limits_that_cannot_be_met_are_refused(low: int, high: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        Limits(low, high, seconds)


@pytest.mark.parametrize("share", ["width", "clock_share", "threshold"])
def test_shares_lie_between_0_and_1(share: str) -> None:
    with pytest.raises(ValueError, match="expected shares from 0 to 1"):
        Limits(1, 1, 1.0, **{share: 1.5})  # type: ignore[arg-type]


def test_a_mode_needs_its_device() -> None:
    with pytest.raises(timing.TimingError, match="needs a CUDA device"):
        timing.sampler("cold", lambda: None)
    with pytest.raises(timing.TimingError, match="expected one of cold, graph, hot, host"):
        timing.sampler("warm", lambda: None)
