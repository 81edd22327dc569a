"""The instruments of a CUDA device, where there is one; the ceilings on a CPU too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="the instruments need torch")

from tinylm.bench import device, timing  # noqa: E402

LIMITS = timing.Limits(min_samples=3, max_samples=3, seconds=1.0)


@pytest.fixture(scope="module")
def gpu() -> Iterator[device.Gpu]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield device.Gpu()


def test_ceilings_of_a_cpu_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CPU_COPY_BYTES", 1 << 20)
    ceilings = device.Ceilings(None)
    copy, read = ceilings.bandwidth
    assert copy and read and min(copy, read) > 0 and ceilings.bandwidth == (copy, read)
    flops = ceilings.flops("fp32")
    assert flops is not None and flops > 0 and ceilings.flops("fp32") == flops


def test_a_failed_driver_call_names_its_status() -> None:
    class Status:
        value, name = 700, "CUDA_ERROR_ILLEGAL_ADDRESS"

    with pytest.raises(device.DeviceError, match="ILLEGAL_ADDRESS"):
        device._ok((Status(),))


def test_ceilings_of_a_gpu(gpu: device.Gpu) -> None:
    ceilings = device.Ceilings(gpu)
    assert all((rate or 0) > 0 for rate in ceilings.bandwidth)
    assert all((ceilings.flops(dtype) or 0) > 0 for dtype in ("fp32", "fp16"))


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
        timing.cold(x.item, gpu)()


@pytest.mark.parametrize("mode", timing.MODES)
def test_every_mode_does_the_work_and_gives_seconds(gpu: device.Gpu, mode: str) -> None:
    x = torch.zeros(1, dtype=torch.float64, device="cuda")
    sample = timing.sampler(mode, lambda: x.add_(1), gpu, torch.cuda.synchronize)
    before = x.item()
    (samples,) = timing.collect([sample], LIMITS)
    assert x.item() - before >= 3 and all(0 < s < 1 for s in samples.seconds)


def test_reading_and_the_clock(gpu: device.Gpu) -> None:
    gpu.read(torch.randint(1 << 62, (1003 * 2,), device="cuda"))  # a length that no unrolling divides
    gpu.flush()
    torch.cuda.synchronize()
    assert 1e8 < gpu.sm_clock_hz() < 1e10
