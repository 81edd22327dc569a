"""How one callable is timed: `cold`, `graph`, `hot`, `host`.

Every mode is a *sampler*: it takes blocks of samples, each in seconds per call of the work. Samplers hold no state
between blocks, so that cells can be sampled in turn (`sampling.collect` takes any number of them).

cold   before each sample the L2 cache is filled with other data by reading it; neither a warm cache nor a launch gap
       is part of the figure. One call is captured with the flush before it and a stamp of the device's timer on
       either side, so that all of it reaches the device at once; work that cannot be captured is queued while a
       blocking kernel holds the stream
graph  the same for work that must run from a CUDA graph; an error where it cannot be captured
hot    back to back between two events, no flush, not held: the throughput of repeated work
host   wall clock between synchronizations: for loops that must return to the host, and for CPUs
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Work = Callable[[], Any]
Meanwhile = Callable[[], Any]

MODES = ("cold", "graph", "hot", "host")

# One sample of `hot`, and of `host` for very short work, repeats the call until it lasts about this long, so that
# the resolution of the clock (0.5 us for CUDA events, 0.1 us for perf_counter) stays below 0.1% of a sample.
HOT_SAMPLE_S = 2e-3
HOST_SAMPLE_S = 2e-4
MAX_CALLS_PER_SAMPLE = 10_000

_now = time.perf_counter  # kept here, so that replacing it elsewhere changes nothing


class TimingError(RuntimeError):
    """The work cannot be timed in the mode that was asked for; the message says which mode would do."""


@dataclass(frozen=True)
class Limits:
    """When to stop: once the median is known to `width`, or after `seconds`, or at `max_samples`; never before
    `min_samples`.

    width: of the median's 95% confidence interval, both sides together, as a share of the median.
    clock_share: a block whose clock is below this share of the run's steady clock is repeated. threshold: the smallest
    difference between peers that counts.
    """

    min_samples: int
    max_samples: int
    seconds: float
    width: float = 0.0
    clock_share: float = 0.75
    threshold: float = 0.005
    warmup_calls: int = 3
    warmup_seconds: float = 0.005

    def __post_init__(self) -> None:
        if not (1 <= self.min_samples <= self.max_samples and self.seconds > 0):
            raise ValueError(
                f"samples {self.min_samples} to {self.max_samples} within {self.seconds} s: expected "
                "1 <= minimum <= maximum and a positive time"
            )
        if not all(0 <= share <= 1 for share in (self.width, self.clock_share, self.threshold)):
            raise ValueError(
                f"interval width {self.width}, clock share {self.clock_share}, threshold {self.threshold}: expected "
                "shares from 0 to 1"
            )


GPU_LIMITS = Limits(min_samples=10, max_samples=500, seconds=0.4, width=0.005)
CPU_LIMITS = Limits(min_samples=5, max_samples=200, seconds=0.5, width=0.02, threshold=0.02)


@dataclass(frozen=True)
class Sampler:
    """take(count, meanwhile) gives `count` samples; it calls `meanwhile` once, while the device works where it can.

    calls: of the work in each sample. flush_s: what flushing adds to each sample's wall time. queued: how the work
    reaches the device, `graph` or `stream`, where that matters. again: a call that runs what was timed and gives its
    result, where that is not the work itself. period: how long a sample takes, where that is known.
    """

    take: Callable[[int, Meanwhile], list[float]]
    calls: int = 1
    flush_s: float = 0.0
    queued: str | None = None
    again: Work | None = None
    period: float | None = None


def host(work: Work, sync: Callable[[], Any] | None = None, about: float = 0.0) -> Sampler:
    """Wall clock of one call, from an idle device to an idle device.

    Work of less than HOST_SAMPLE_S is repeated within a sample, without synchronization in between. about: how long a
    call takes, if that is known: long work is then not run to find it out.
    """

    def once(calls: int) -> float:
        if sync is not None:
            sync()
        start = _now()
        for _ in range(calls):
            work()
        if sync is not None:
            sync()
        return _now() - start

    long = about > 10 * HOST_SAMPLE_S
    calls = 1 if long else _calls_per_sample(once, HOST_SAMPLE_S)

    def take(count: int, meanwhile: Meanwhile) -> list[float]:
        found = [once(calls) / calls for _ in range(count)]
        meanwhile()
        return found

    return Sampler(take, calls, period=about if long else None)


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

    def once(calls: int, meanwhile: Meanwhile | None = None) -> float:
        start.record()
        for _ in range(calls):
            work()
        end.record()
        if meanwhile is not None:
            meanwhile()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    calls = _calls_per_sample(once, HOT_SAMPLE_S)

    def take(count: int, meanwhile: Meanwhile) -> list[float]:
        return [once(calls, meanwhile if i == count - 1 else None) / calls for i in range(count)]

    return Sampler(take, calls)


def cold(work: Work, device: Any) -> Sampler:
    """One call after a flush of the L2 cache, from a CUDA graph where it can be captured, else held in the stream.

    Work that copies tensors is held in the stream too: in a graph such a copy is slower (H200: 2.8 TB/s, not 4.3).

    device: a `tinylm.bench.device.Gpu`; its stream must be the current one. Raises TimingError where the work can
    neither be captured nor queued while the stream is held: it synchronizes, or takes longer than a hold lasts.
    """
    work()  # what a first call makes (handles, plans, compiled code) may take longer than a hold lasts
    if device.fine_timer:
        try:
            return graph(work, device, copies=False)
        except TimingError:
            device.torch.cuda.synchronize()
    return held(work, device)


def graph(work: Work, device: Any, copies: bool = True) -> Sampler:
    """As `cold`, of work that must run from a CUDA graph. The work's buffers must outlive the sampler.

    copies: whether it may copy tensors.
    """
    for _ in range(2):  # capture wants lazy initialization done
        work()
    if not device.fine_timer:
        return held(_captured(work, device).replay, device, "graph")

    found: list[int] = []

    def body(ease: bool) -> None:
        device.flush()
        device.start_stamp()
        if ease:
            device.ease_start()
        work()
        found[:] = [device.captured_copies()]
        device.end_stamp()

    try:
        captured = _captured(lambda: body(True), device)
    except TimingError:  # the first thing queued is no kernel (a copy, a memset), or there are several
        captured = _captured(lambda: body(False), device)
    if found[0] and not copies:
        raise TimingError("the work copies tensors, which a graph does in another way: it is held in the stream")
    captured.replay()
    device.torch.cuda.synchronize()
    device.forget_stamps()

    def take(count: int, meanwhile: Meanwhile) -> list[float]:
        for _ in range(count):
            captured.replay()
        meanwhile()
        return device.stamped(count)

    return Sampler(take, flush_s=device.flush_s, queued="graph", again=_replayed(work, device))


def _replayed(work: Work, device: Any) -> Work:
    """The work as a graph has it, with its result: captured once more when first called, because a result that is kept
    takes its memory from the pool."""
    made: list[Any] = []
    graphs: list[Any] = []

    def again() -> Any:
        if not graphs:
            graphs.append(device.capture(lambda: made.append(work())))
        graphs[0].replay()
        return made[0]

    return again


def _captured(body: Work, device: Any) -> Any:
    try:
        return device.capture(body)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TimingError(
            f"the work cannot be captured in a CUDA graph ({reason}): time it with timing='cold' or 'host'"
        ) from error


def held(work: Work, device: Any, queued: str = "stream") -> Sampler:
    """One call after a flush, queued behind a blocking kernel, between stamps, or events where the timer is coarse."""
    torch, fine = device.torch, device.fine_timer  # looked at now: finding it out waits for the stream
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    device.forget_stamps()

    def one(meanwhile: Meanwhile | None) -> float:
        device.flush()
        with device.held() as hold:
            device.start_stamp() if fine else start.record()
            work()
            device.end_stamp() if fine else end.record()
        if meanwhile is not None:
            meanwhile()
        torch.cuda.current_stream().synchronize()
        if hold.timed_out():
            device.forget_stamps()
            raise TimingError(
                f"the work was not queued within {hold.limit_s * 1e3:.0f} ms (does it synchronize with the host?): "
                "time it with timing='host'"
            )
        return device.stamped(1)[0] if fine else start.elapsed_time(end) * 1e-3

    def take(count: int, meanwhile: Meanwhile) -> list[float]:
        return [one(meanwhile if i == count - 1 else None) for i in range(count)]

    return Sampler(take, flush_s=device.flush_s, queued=queued)


def sampler(
    mode: str, work: Work, device: Any = None, sync: Callable[[], Any] | None = None, about: float = 0.0
) -> Sampler:
    """The sampler of a mode by name. `device` is a `Gpu`, or None on a CPU, where only `host` exists."""
    if mode not in MODES:
        raise TimingError(f"timing {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "host":
        return host(work, sync, about)
    if device is None:
        raise TimingError(f"timing {mode!r} needs a CUDA device: use 'host' on a CPU")
    return {"cold": cold, "graph": graph, "hot": hot}[mode](work, device)
