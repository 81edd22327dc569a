"""Memory by name: the parts are what was planted, and add up to what is used beyond the prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench import footprint
from tinylm.bench.footprint import PARTS, Reading
from tinylm.bench.page import sections

SIZES = st.integers(0, 1 << 40)


@given(st.fixed_dictionaries(dict.fromkeys(PARTS, SIZES)), SIZES, SIZES, SIZES)
def test_each_part_is_what_was_planted(planted: dict[str, int], predicted: int, first: int, held: int) -> None:
    """first: bytes of a tensor that makes the context. held: reserved after the small pass, whatever it holds."""
    context = Reading(planted["context_bytes"] + first, first, first, first, first)
    outside = planted["context_bytes"] + planted["libraries_bytes"]
    workspace = planted["workspace_bytes"]
    warm = Reading(outside + workspace + held, workspace + held, workspace, workspace, workspace)
    requested = predicted + workspace + planted["inputs_bytes"]
    allocated = requested + planted["rounding_bytes"]
    peak = allocated + planted["transient_bytes"]
    reserved = peak + planted["unused_bytes"]
    end = Reading(outside + planted["unexplained_bytes"] + reserved, reserved, allocated, requested, peak)
    found = footprint.parts(context, warm, end, predicted)
    assert found == planted
    assert sum(found.values()) == end.used - predicted


@given(st.tuples(*[st.builds(Reading, *[SIZES] * 5)] * 3), SIZES)
def test_the_parts_add_up_whatever_was_read(readings: tuple[Reading, Reading, Reading], predicted: int) -> None:
    assert sum(footprint.parts(*readings, predicted).values()) == readings[-1].used - predicted


def allocator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for torch's: numbers that tell themselves apart, and the waits for the device."""
    asked: list[str] = []
    kinds = {"reserved": 2, "allocated": 3, "requested": 4}
    stats = {
        f"{kind}_bytes.all.{when}": 10 * n + (when == "peak")
        for kind, n in kinds.items()
        for when in ("current", "peak")
    }
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats)
    return asked


@pytest.mark.parametrize(("used", "expected"), [(lambda: 100, Reading(100, 20, 30, 40, 31)), (lambda: None, None)])
def test_a_reading_waits_for_the_device_and_is_none_without_the_driver(
    used: Callable[[], int | None], expected: Reading | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = allocator(monkeypatch)
    assert footprint.read(used) == expected
    assert asked == ["wait"]


def test_the_page_tells_the_parts() -> None:
    line: dict[str, Any] = {"label": "card", "peak_allocated_bytes": None, "device_used_bytes": None}
    line |= {"predicted_bytes": 1 << 20}
    rows = [line | dict.fromkeys(PARTS, n << 20) for n in (3, 8)] + [line]
    (said,) = sections.memory(rows, ["card", "other"])
    assert said.startswith("card: beyond the prediction, in MiB over 2 cells: context 3 to 8, libraries 3 to 8")
    assert said.endswith("unexplained 3 to 8.")
