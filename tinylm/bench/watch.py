"""What the device says while it is measured: clock, temperature, power, reasons for throttling; and energy, when asked.

The clock comes from the device itself: the cycles that each multiprocessor counted over a block, by the global timer.
The rest is NVML's, read while the device works, so that it is the state of the work and costs no time.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinylm.bench.device import Gpu
from tinylm.bench.telemetry import Nvml

_now = time.perf_counter

# Blocks over which the run's steady clock is the median: a laptop that has become warm is judged by its new state.
STEADY_BLOCKS = 64
# The clock has risen when so many spans after each other agree to this share; not waited for longer than the last.
SETTLED_SPANS, SETTLED_SHARE, SETTLE_S = 3, 0.005, 1.0
# NVML's readings take 0.3 ms and change slower than this.
READ_EVERY_S = 0.01
READINGS = ("temperature_c", "power_w", "throttle")
# The counter steps every 0.1 s on an H200, so that the edges of 5 s are known to 0.4% when waited for.
ENERGY_S = 5.0
ENERGY_BATCH_S = 0.02


@dataclass
class Block:
    """Samples next to each other in time, and what the device said meanwhile; None where it could not tell."""

    seconds: list[float]
    clock_hz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttle: list[str] | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Steady:
    """The clock that this run's device keeps: the median of the last blocks' clocks."""

    def __init__(self) -> None:
        self._clocks: deque[float] = deque(maxlen=STEADY_BLOCKS)

    def add(self, clock_hz: float) -> None:
        self._clocks.append(clock_hz)

    def too_low(self, clock_hz: float, share: float) -> bool:
        return bool(self._clocks) and clock_hz < share * statistics.median(self._clocks)


class Watch:
    """What is read of the device around a block and while it works. This one reads nothing: a CPU's."""

    steady: Steady | None = None

    def start(self) -> None: ...

    def meanwhile(self) -> None: ...

    def stop(self, seconds: list[float]) -> Block:
        return Block(seconds)


class GpuWatch(Watch):
    """Reads a GPU; `settle` first lets its clock rise."""

    def __init__(self, gpu: Gpu, nvml: Nvml) -> None:
        self._gpu, self._nvml = gpu, nvml
        self._read_at = -1.0
        self._readings: dict[str, Any] = {}
        self.steady = Steady()

    def settle(self) -> None:
        """Keep the device busy until its clock stands, and take that for the run's first steady clock."""
        spans: list[float] = []
        deadline = _now() + SETTLE_S
        while _now() < deadline:
            self.start()
            for _ in range(200):
                self._gpu.flush()
            clock = self.stop([0.0]).clock_hz
            if clock is None:
                return
            spans.append(clock)
            last = spans[-SETTLED_SPANS:]
            if len(last) == SETTLED_SPANS and max(last) <= min(last) * (1 + SETTLED_SHARE):
                break
        assert self.steady is not None
        self.steady.add(spans[-1])

    def start(self) -> None:
        self._gpu.mark_clocks(end=False)

    def meanwhile(self) -> None:
        if _now() - self._read_at >= READ_EVERY_S:
            self._readings = {name: self._nvml.read(name) for name in READINGS}
            self._read_at = _now()

    def stop(self, seconds: list[float]) -> Block:
        self._gpu.mark_clocks(end=True)
        clock = self._gpu.clock_hz()
        read = self._readings
        return Block(seconds, clock, read.get("temperature_c"), read.get("power_w"), read.get("throttle"))


@dataclass(frozen=True)
class Energy:
    """Of `calls` calls over `seconds`."""

    joules: float
    seconds: float
    calls: int


def energy(
    batch: Callable[[], Any],
    calls: int,
    counter: Callable[[], float | None],
    seconds: float = ENERGY_S,
    now: Callable[[], float] = _now,
) -> Energy | None:
    """What the device's counter adds up to over at least `seconds`, from one of its steps to another.

    batch: runs `calls` calls and waits for their end; best about ENERGY_BATCH_S. counter: joules since some time, or
    None where the card has none: then so is the result.
    """

    def step(last: float | None) -> tuple[int, float | None]:
        """Run until the counter moves; the batches that took."""
        for done in range(1, 10_000):
            batch()
            value = counter()
            if value is None or value != last:
                return done, value
        return 0, None

    _, first = step(counter())
    start, batches, last = now(), 0, first
    while last is not None and first is not None:
        done, last = step(last)
        batches += done
        if last is not None and now() - start >= seconds:
            return Energy(last - first, now() - start, batches * calls)
    return None
