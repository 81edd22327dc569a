"""Cells: nested rungs, ids that name nothing but the parameters, overrides."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.bench import plan

VALUES: dict[str, Any] = {
    "dtype": st.sampled_from(["bf16", "fp16", "fp32"]),
    "impl": st.sampled_from(["eager", "torch", "compile"]),
    "hidden": st.integers(1, 65_536),
}
GRIDS = st.fixed_dictionaries({axis: st.lists(v, min_size=1, max_size=3) for axis, v in VALUES.items()})
RUNGS = st.fixed_dictionaries({rung: st.lists(GRIDS, max_size=3) for rung in plan.RUNGS})


@given(RUNGS, st.booleans())
def test_rungs_are_nested_and_each_cell_stands_once(rungs: dict[str, list[plan.Grid]], bf16: bool) -> None:
    smaller: list[plan.Cell] = []
    for size in plan.RUNGS:
        found = plan.expand(rungs, size, {}, {}, bf16)
        ids = [plan.cell_id(cell) for cell in found]
        assert found[: len(smaller)] == smaller
        assert len(set(ids)) == len(ids) == len({tuple(cell.items()) for cell in found})
        smaller = found


@given(RUNGS)
def test_a_card_without_bf16_has_the_same_cells_in_fp16(rungs: dict[str, list[plan.Grid]]) -> None:
    new = {plan.cell_id(cell) for cell in plan.expand(rungs, "datacenter", {}, {}, True)}
    old = {plan.cell_id(cell) for cell in plan.expand(rungs, "datacenter", {}, {}, False)}
    assert old == {name.replace("bf16", "fp16") for name in new}
    chosen = plan.expand(rungs, "datacenter", {"dtype": ["bf16"]}, {}, False)
    assert all(cell["dtype"] == "bf16" for cell in chosen)  # whoever asks for it gets it


def test_an_axis_may_follow_from_the_others_and_overrides_replace_it() -> None:
    rungs = {"quick": [{"hidden": [2, 4], "rows": lambda cell: 8 // cell["hidden"], "impl": ["a"]}]}
    assert [c["rows"] for c in plan.expand(rungs, "quick", {}, {}, True)] == [4, 2]
    assert [c["rows"] for c in plan.expand(rungs, "quick", {"hidden": [8]}, {}, True)] == [1]
    assert [c["rows"] for c in plan.expand(rungs, "quick", {"rows": [7]}, {}, True)] == [7, 7]
    assert list(plan.expand(rungs, "quick", {}, {}, True)[0]) == ["hidden", "rows", "impl"]
    assert plan.expand(rungs, "quick", {"context": [512]}, {}, True) == plan.expand(rungs, "quick", {}, {}, True)


def test_ids_tell_numbers_by_the_letter_of_their_axis() -> None:
    assert (
        plan.cell_id({"direction": "forward", "hidden": 4096, "rows": 1, "impl": "torch"}) == "forward-h4096-r1-torch"
    )


@pytest.mark.parametrize("text", ["0", "-1", "512,", "1e3", "abc", "5 12", "²"])
def test_sizes_must_be_positive_whole_numbers(text: str) -> None:
    if text == "512,":
        assert plan.parse_values("context", text) == [512]
        return
    with pytest.raises(plan.PlanError, match="--contexts"):
        plan.parse_values("context", text)


def test_an_experiment_takes_those_values_that_it_knows() -> None:
    rungs = {"quick": [{"preset": ["nano"]}]}
    known = {"preset": ["nano", "tiny"]}
    assert plan.expand(rungs, "quick", {"preset": ["huge", "tiny"]}, known, True) == [{"preset": "tiny"}]
    assert plan.expand(rungs, "quick", {"preset": ["huge"]}, known, True) == []


def test_cells_that_cannot_be_are_left_out_or_refused_when_named() -> None:
    rungs = {"quick": [{"preset": ["gpt", "rope"], "context": [8]}]}

    def refuse(cell: plan.Cell) -> str | None:
        return "gpt ends at 10" if cell["preset"] == "gpt" and cell["context"] > 10 else None

    assert len(plan.expand(rungs, "quick", {}, {}, True, refuse)) == 2
    longer = plan.expand(rungs, "quick", {"context": [20]}, {}, True, refuse)
    assert longer == [{"preset": "rope", "context": 20}]
    for presets in (["gpt", "rope"], ["gpt"]):
        with pytest.raises(plan.PlanError, match="gpt ends at 10"):
            plan.expand(rungs, "quick", {"context": [20], "preset": presets}, {}, True, refuse)


def test_a_list_without_values_is_refused() -> None:
    with pytest.raises(plan.PlanError, match="at least one"):
        plan.parse_values("preset", " , ")


def test_larger_is_another_size_and_nothing_else() -> None:
    cell = {"impl": "a", "dtype": "fp16", "batch": 8, "context": 1024}
    for bigger in ({"batch": 9}, {"context": 2048}, {"batch": 16, "context": 2048}):
        assert plan.larger(cell | bigger, cell) and not plan.larger(cell, cell | bigger)
    for other in ({}, {"batch": 16, "context": 512}, {"batch": 16, "impl": "b"}, {"dtype": "fp32"}, {"rows": 2}):
        assert not plan.larger(cell | other, cell)
