"""Energy from a counter that steps, and what is read while a device works."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench import watch


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
