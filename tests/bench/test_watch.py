"""Energy from a counter that steps, and what is read while a device works."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench import trial, watch


class Card:
    """Draws `watts`; its counter moves every `step` seconds; a batch of work takes `batch` seconds."""

    def __init__(self, watts: float, step: float, batch: float) -> None:
        self.watts, self.step, self.batch_s, self.now = watts, step, batch, 0.0

    def batch(self) -> None:
        self.now += self.batch_s

    def counter(self) -> float:
        return self.watts * self.step * int(self.now / self.step)

    def time(self) -> float:
        return self.now


@given(st.floats(50, 700), st.floats(0.02, 0.2), st.floats(0.001, 0.05))
def test_energy_is_power_times_time_to_a_step_of_the_counter(watts: float, step: float, batch: float) -> None:
    card = Card(watts, step, batch)
    found = watch.energy(card.batch, 7, card.counter, seconds=5.0, now=card.time)
    assert found is not None and found.seconds >= 5.0 and found.calls % 7 == 0
    # Either edge is seen at the end of a batch in which the counter stepped: at most one batch, and one step, late.
    assert found.joules / found.seconds == pytest.approx(watts, rel=2 * (batch + step) / 5.0)


def test_a_card_without_a_counter_has_no_energy() -> None:
    assert watch.energy(lambda: None, 1, lambda: None) is None


def test_a_counter_that_stands_still_does_not_run_for_ever() -> None:
    card = Card(0.0, 0.1, 0.001)
    assert watch.energy(card.batch, 1, card.counter, now=card.time) is None


@pytest.mark.parametrize("from_host", [False, True])
def test_what_is_timed_from_the_host_is_launched_from_it_and_the_rest_from_a_graph(from_host: bool) -> None:
    """So that the energy of a loop is not that of a graph of the whole loop."""
    done: list[str] = []

    class Gpu:
        def capture(self, body: Callable[[], None]) -> Any:
            body()
            done.append("captured")
            return SimpleNamespace(replay=lambda: done.append("replay"))

        def drain(self) -> None:
            done.append("drain")

    machine: Any = SimpleNamespace(gpu=Gpu())
    run, count = trial.batch(machine, lambda: done.append("work"), watch.ENERGY_BATCH_S / 3, from_host=from_host)
    assert count == 3
    run()
    work = ["work"] * 3
    assert done == ([*work, "drain"] if from_host else [*work, "captured", "replay", "drain"])
