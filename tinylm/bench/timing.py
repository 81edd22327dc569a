"""How one callable is timed: `cold`, `graph`, `hot`, `host`.

Every mode is a *sampler*: a callable that takes one sample, in seconds per call of the work. Samplers hold no
state between samples, so that cells can be sampled in turn (`collect` takes any number of them).

cold   before each sample the L2 cache is filled with other data by reading it, and a blocking kernel holds the
       stream while the work is queued, so that neither a warm cache nor a launch gap is part of the figure
graph  the same around the replay of a CUDA graph: for work of many small kernels
hot    back to back between two events, no flush, not held: the throughput of repeated work
host   wall clock between synchronizations: for loops that must return to the host, and for CPUs
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Sampler = Callable[[], float]
Work = Callable[[], Any]

MODES = ("cold", "graph", "hot", "host")

# One sample of `hot`, and of `host` for very short work, repeats the call until it lasts about this long, so that
# the resolution of the clock (0.5 us for CUDA events, 0.1 us for perf_counter) stays below 0.1% of a sample.
HOT_SAMPLE_S = 2e-3
HOST_SAMPLE_S = 2e-4
MAX_CALLS_PER_SAMPLE = 10_000


class TimingError(RuntimeError):
    """The work cannot be timed in the mode that was asked for; the message says which mode would do."""


@dataclass(frozen=True)
class Limits:
    """When to stop: at `max_samples`, or after `seconds` once there are `min_samples`."""

    min_samples: int
    max_samples: int
    seconds: float
    warmup_calls: int = 3
    warmup_seconds: float = 0.02

    def __post_init__(self) -> None:
        if not (1 <= self.min_samples <= self.max_samples and self.seconds > 0):
            raise ValueError(
                f"samples {self.min_samples} to {self.max_samples} within {self.seconds} s: expected "
                "1 <= minimum <= maximum and a positive time"
            )


# 30 to 50 samples put the standard error of a median at a fifth of the sample spread or less.
GPU_LIMITS = Limits(min_samples=10, max_samples=50, seconds=0.3)
CPU_LIMITS = Limits(min_samples=5, max_samples=30, seconds=0.5)


@dataclass
class Samples:
    """Seconds per call, in the order in which they were taken, and why sampling stopped."""

    seconds: list[float] = field(default_factory=list)
    stop_reason: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@contextmanager
def _collector_off() -> Any:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def collect(samplers: Sequence[Sampler], limits: Limits) -> list[Samples]:
    """Sample each in turn, round after round, until the limits (times the number of samplers) are met.

    The order is rotated from round to round, so that drift of the machine and the effect of a neighbour fall on
    all alike. One sampler is the plain case.
    """
    taken = [Samples() for _ in samplers]
    count = len(samplers)
    with _collector_off():
        for sampler in samplers:
            warm(sampler, limits)
        deadline = time.perf_counter() + limits.seconds * count
        for turn in range(limits.max_samples):
            if turn >= limits.min_samples and time.perf_counter() > deadline:
                reason = "time"
                break
            for offset in range(count):
                i = (turn + offset) % count
                taken[i].seconds.append(samplers[i]())
        else:
            reason = "samples"
    for samples in taken:
        samples.stop_reason = reason
    return taken


def warm(sampler: Sampler, limits: Limits) -> None:
    """Run the sampler, discarding what it says, until the clocks have risen and lazy work is done."""
    start = time.perf_counter()
    for call in range(10_000):
        elapsed = time.perf_counter() - start
        if elapsed > limits.seconds or (call >= limits.warmup_calls and elapsed >= limits.warmup_seconds):
            return
        sampler()


def host(work: Work, sync: Callable[[], Any] | None = None) -> Sampler:
    """Wall clock of one call, from an idle device to an idle device.

    Work of less than HOST_SAMPLE_S is repeated within a sample, without synchronization in between.
    """

    def once(calls: int) -> float:
        if sync is not None:
            sync()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if sync is not None:
            sync()
        return time.perf_counter() - start

    once(1)
    calls = _calls_per_sample(once, HOST_SAMPLE_S)
    return lambda: once(calls) / calls


def _calls_per_sample(once: Callable[[int], float], wanted: float) -> int:
    calls = 1
    while True:
        elapsed = once(calls)
        if elapsed >= wanted or calls >= MAX_CALLS_PER_SAMPLE:
            return calls
        calls = min(MAX_CALLS_PER_SAMPLE, max(calls + 1, int(calls * 1.2 * wanted / max(elapsed, 1e-9))))


def hot(work: Work, device: Any) -> Sampler:
    """Mean of many calls back to back between two CUDA events. Launch gaps are part of it where they exist."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(calls: int) -> float:
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    once(1)
    calls = _calls_per_sample(once, HOT_SAMPLE_S)
    return lambda: once(calls) / calls


def cold(work: Work, device: Any) -> Sampler:
    """One call after a flush of the L2 cache, queued behind a blocking kernel.

    device: a `tinylm.bench.device.Gpu`. Raises TimingError where the work cannot be queued while the stream is
    held: it synchronizes, or needs longer than the blocking kernel waits.
    """
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()  # what a first call makes (handles, plans, compiled code) may take longer than a hold lasts
    torch.cuda.synchronize()

    def sample() -> float:
        device.flush()
        with device.held() as hold:
            start.record()
            work()
            end.record()
        end.synchronize()
        if hold.timed_out():
            raise TimingError(
                f"the work was not queued within {hold.limit_s * 1e3:.0f} ms (does it synchronize with the host?): "
                "time it with timing='host'"
            )
        return start.elapsed_time(end) * 1e-3

    return sample


def graph(work: Work, device: Any) -> Sampler:
    """`cold` around the replay of a CUDA graph of one call. The work's buffers must outlive the sampler."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants lazy initialization done, on a stream of its own
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        work()
    return cold(captured.replay, device)


def sampler(mode: str, work: Work, device: Any = None, sync: Callable[[], Any] | None = None) -> Sampler:
    """The sampler of a mode by name. `device` is a `Gpu`, or None on a CPU, where only `host` exists."""
    if mode not in MODES:
        raise TimingError(f"timing {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "host":
        return host(work, sync)
    if device is None:
        raise TimingError(f"timing {mode!r} needs a CUDA device: use 'host' on a CPU")
    return {"cold": cold, "graph": graph, "hot": hot}[mode](work, device)
