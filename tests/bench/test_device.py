"""The instruments of a CUDA device, where there is one; the ceilings on a CPU too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="the instruments need torch")

from tinylm.bench import ceilings, device, sampling, timing  # noqa: E402

LIMITS = timing.Limits(min_samples=3, max_samples=3, seconds=1.0)


@pytest.fixture(scope="module")
def gpu() -> Iterator[device.Gpu]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    made = device.Gpu()
    with torch.cuda.stream(made.stream):  # as measuring does: the default stream cannot be captured
        yield made


def test_ceilings_of_a_cpu_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CPU_COPY_BYTES", 1 << 20)
    found = ceilings.Ceilings(None)
    copy, read = found.bandwidth
    assert copy and read and min(copy, read) > 0 and found.bandwidth == (copy, read)
    flops = found.flops("fp32")
    assert flops is not None and flops > 0 and found.flops("fp32") == flops


def test_a_failed_driver_call_names_its_status() -> None:
    class Status:
        value, name = 700, "CUDA_ERROR_ILLEGAL_ADDRESS"

    with pytest.raises(device.DeviceError, match="ILLEGAL_ADDRESS"):
        device._ok((Status(),))


def test_ceilings_of_a_gpu(gpu: device.Gpu) -> None:
    found = ceilings.Ceilings(gpu)
    assert all((rate or 0) > 0 for rate in found.bandwidth)
    assert all((found.flops(dtype) or 0) > 0 for dtype in ("fp32", "fp16"))


def test_the_stream_is_held_until_release(gpu: device.Gpu) -> None:
    event = torch.cuda.Event()
    with gpu.held() as hold:
        event.record()
        assert not event.query()
    event.synchronize()
    assert not hold.timed_out()


def test_a_hold_ends_by_itself(gpu: device.Gpu) -> None:
    with gpu.held() as hold:
        torch.cuda.synchronize()
    assert hold.timed_out()


def test_work_that_waits_for_the_host_is_refused_by_cold(gpu: device.Gpu) -> None:
    x = torch.ones(1, device="cuda")
    with pytest.raises(timing.TimingError, match="timing='host'"):
        timing.cold(x.item, gpu).take(1, lambda: None)
    with pytest.raises(timing.TimingError, match="cannot be captured"):
        timing.graph(x.item, gpu)
    assert x.item() == 1


@pytest.mark.parametrize("mode", timing.MODES)
def test_every_mode_does_the_work_and_gives_seconds(gpu: device.Gpu, mode: str) -> None:
    x = torch.zeros(1, dtype=torch.float64, device="cuda")
    sampler = timing.sampler(mode, lambda: x.add_(1), gpu, torch.cuda.synchronize)
    before = x.item()
    (samples,) = sampling.collect([sampler], LIMITS)
    assert x.item() - before >= 3 and all(0 < s < 1 for s in samples.seconds)


def test_work_that_begins_with_a_copy_or_is_empty_can_be_captured(gpu: device.Gpu) -> None:
    x, y = (torch.ones(1 << 20, device="cuda") for _ in range(2))
    for work in (lambda: x.copy_(y), lambda: None, lambda: (x.zero_(), x.copy_(y))):
        sampler = timing.graph(work, gpu)
        assert sampler.queued == "graph" and all(0 <= s < 1 for s in sampler.take(5, lambda: None))


def test_copies_are_timed_as_the_stream_makes_them(gpu: device.Gpu) -> None:
    x, y = (torch.ones(1 << 20, device="cuda") for _ in range(2))
    for work, queued in ((lambda: x.copy_(y), "stream"), (lambda: x.add_(y), "graph"), (x.zero_, "graph")):
        sampler = timing.cold(work, gpu)
        assert sampler.queued == queued and all(0 <= s < 1 for s in sampler.take(5, lambda: None))


def test_work_that_cannot_be_captured_is_held_in_the_stream(gpu: device.Gpu) -> None:
    x = torch.ones(1 << 20, device="cuda")

    def work() -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph")
        x.add_(1)

    sampler = timing.cold(work, gpu)
    assert sampler.queued == "stream" and all(0 < s < 1 for s in sampler.take(3, lambda: None))
    assert gpu.stamped(0) == []


def test_stamps_agree_with_events(gpu: device.Gpu) -> None:
    """Of work of milliseconds, to the events' own cost and step: a few microseconds."""
    x = torch.randn(1 << 28, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sampler = timing.cold(lambda: x.mul_(1.0), gpu)
    stamped = sorted(sampler.take(9, lambda: None))[4]
    taken = []
    for _ in range(9):
        start.record()
        x.mul_(1.0)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e-3)
    assert stamped == pytest.approx(sorted(taken)[4], rel=0.05, abs=20e-6)


def test_the_flush_empties_the_cache(gpu: device.Gpu) -> None:
    """A load from memory takes at least half as long again as one from the L2 cache, on any card."""
    x = torch.randint(1 << 30, (1 << 20,), device="cuda")
    gpu.latency_cycles(x)
    hot = min(gpu.latency_cycles(x) for _ in range(3))
    gpu.flush()
    assert gpu.latency_cycles(x) > 1.5 * hot


def test_reading_and_the_clock(gpu: device.Gpu) -> None:
    gpu.read(torch.randint(1 << 62, (1003 * 2,), device="cuda"))  # a length that no unrolling divides
    gpu.mark_clocks(end=False)
    for _ in range(100):
        gpu.flush()
    gpu.mark_clocks(end=True)
    assert 1e8 < (gpu.clock_hz() or 0) < 1e10
    first, second = gpu.stamp(), gpu.stamp()
    assert second.ns() > first.ns()
    gpu.drain()
