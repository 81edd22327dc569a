"""Where the wall time of a run goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

_now = time.perf_counter

# Phases that are the run's purpose, or that a mode needs; all others are what measuring costs.
WORK = ("work", "flush")
# Before a cell can be measured at all: importing, its inputs and model, its reference, its compilation.
PREPARATION = ("import", "inputs", "first call", "check", "fresh process")


class Wall:
    """Seconds by phase, each moment in one phase only: a phase within a phase interrupts it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = _now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def account(self, total: float) -> dict[str, float]:
        """The phases in falling order; what is left of `total` is reporting, pytest's and pytest-benchmark's."""
        rest = {"reporting": max(0.0, total - sum(self.seconds.values())) + self.seconds.get("reporting", 0.0)}
        return dict(sorted((self.seconds | rest).items(), key=lambda item: -item[1]))

    def shift(self, source: str, target: str, seconds: float) -> None:
        """Count some of one phase's time, at most all of it, to another."""
        moved = min(max(0.0, seconds), self.seconds[source])
        self.seconds[source] -= moved
        self.seconds[target] += moved


def overhead(seconds: dict[str, float]) -> float | None:
    """The share of what measuring costs in the time after preparation: all that is neither work nor flush."""
    measuring = {name: value for name, value in seconds.items() if name not in PREPARATION}
    total = sum(measuring.values())
    return 1 - sum(measuring.get(name, 0.0) for name in WORK) / total if total else None
