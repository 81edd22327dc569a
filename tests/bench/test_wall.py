"""Every moment belongs to one phase."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench import wall

STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 5)), max_size=30)


@given(STEPS)
def test_phases_add_up_to_the_time_that_any_was_open(steps: list[tuple[str, bool, int]]) -> None:
    now = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wall, "_now", lambda: now)
        book, expected = wall.Wall(), 0.0
        opened: list[AbstractContextManager[None]] = []
        for name, close, seconds in steps:
            if close and opened:
                opened.pop().__exit__(None, None, None)
            else:
                opened.append(book.phase(name))
                opened[-1].__enter__()
            expected += seconds if opened else 0
            now += seconds
        while opened:
            opened.pop().__exit__(None, None, None)
    assert sum(book.seconds.values()) == pytest.approx(expected)


def test_no_more_is_shifted_than_there_is() -> None:
    book = wall.Wall()
    book.seconds["queue"] = 1.0
    book.shift("queue", "work", 3.0)
    book.shift("queue", "work", -3.0)
    assert dict(book.seconds) == {"queue": 0.0, "work": 1.0}


def test_what_is_left_of_the_total_is_reporting() -> None:
    book = wall.Wall()
    book.seconds |= {"work": 3.0, "reporting": 1.0}
    assert book.account(10.0) == {"reporting": 7.0, "work": 3.0}


def test_what_measuring_costs_is_a_share_of_the_time_after_preparation() -> None:
    seconds = {"import": 100.0, "check": 50.0, "work": 60.0, "flush": 35.0, "queue": 4.0, "statistics": 1.0}
    assert wall.overhead(seconds) == pytest.approx(0.05)
    assert wall.overhead({"import": 1.0}) is None
