"""Which cells an experiment has: grids of parameters per rung, nested, overridden from the command line.

A cell's id depends on its parameters alone, never on the device, so that runs of different cards meet in the same
cells. The rungs are nested: `quick` in `laptop` in `desktop` in `datacenter`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Any

import pytest

RUNGS = ("quick", "laptop", "desktop", "datacenter")

# The parameters that name a cell, the type of their values, and the option that overrides them.
AXES: dict[str, type] = {
    "op": str,
    "impl": str,
    "dtype": str,
    "direction": str,
    "phase": str,
    "preset": str,
    "cache": str,
    "hidden": int,
    "rows": int,
    "batch": int,
    "context": int,
    "ranks": int,
}

# A cell that has at least as much of each, and more of one, needs at least as much memory.
SIZES = ("batch", "context", "rows", "hidden")

Cell = dict[str, Any]
Grid = Mapping[str, Any]  # axis -> values, or a function of the cell built so far


class PlanError(ValueError):
    """A parameter from the command line that no cell can have."""


def option(axis: str) -> str:
    """The command-line option that overrides an axis: `--contexts` for `context`."""
    plural = {"batch": "batches", "rows": "rows", "hidden": "hidden", "ranks": "ranks"}.get(axis, axis + "s")
    return f"--{plural}"


def parse_values(axis: str, text: str) -> list[Any]:
    """`512,1024` to [512, 1024]; raises PlanError for what is not a positive number where one is wanted."""
    kind = AXES[axis]
    values: list[Any] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if kind is int and not (part.isascii() and part.isdigit() and int(part) > 0):
            raise PlanError(f"{option(axis)} {text!r}: expected positive whole numbers, as in {option(axis)} 512,1024")
        values.append(kind(part))
    if not values:
        raise PlanError(f"{option(axis)} {text!r}: expected at least one value")
    return values


def cells(
    *,
    choices: Mapping[str, Collection[str]] | None = None,
    refuse: Callable[[Cell], str | None] | None = None,
    seconds: Mapping[str, float] | None = None,
    quick: Sequence[Grid],
    laptop: Sequence[Grid] = (),
    desktop: Sequence[Grid] = (),
    datacenter: Sequence[Grid] = (),
) -> Callable[[Any], Any]:
    """Mark a benchmark with its grids, one list per rung; each rung adds to those before it.

    choices: axis -> the values that the command line may name. refuse: why a cell that the command line asks for cannot
    be, in one line, or None. seconds: device type -> expected wall time of a cell, for the forecast at the start.
    """
    rungs = dict(zip(RUNGS, (quick, laptop, desktop, datacenter), strict=True))
    return pytest.mark.cells(rungs=rungs, choices=dict(choices or {}), refuse=refuse, seconds=dict(seconds or {}))


def expand(
    rungs: Mapping[str, Sequence[Grid]],
    size: str,
    overrides: Mapping[str, Sequence[Any]],
    choices: Mapping[str, Container[Any]],
    bf16: bool,
    refuse: Callable[[Cell], str | None] | None = None,
) -> list[Cell]:
    """All cells up to the rung `size`, in order, each once.

    Cells that `refuse` refuses are left out; raises PlanError if the command line names their preset, or if no cell is
    left. Of the values that an override gives, an experiment takes those among its `choices`.

    Where the device does not compute bf16, cells of bf16 that nobody asked for become fp16, and fall together with
    those of fp16.
    """
    taken = {
        axis: [value for value in values if axis not in choices or value in choices[axis]]
        for axis, values in overrides.items()
    }
    found: dict[tuple[Any, ...], Cell] = {}
    refused: list[str] = []
    for rung in RUNGS[: RUNGS.index(size) + 1]:
        for grid in rungs.get(rung, ()):
            for cell in _product(grid, taken):
                if overrides and refuse is not None and (reason := refuse(cell)):
                    refused.append(reason)
                    continue
                if cell.get("dtype") == "bf16" and not bf16 and "dtype" not in overrides:
                    cell = cell | {"dtype": "fp16"}
                found.setdefault(tuple(cell.values()), cell)
    if refused and ("preset" in overrides or not found):
        raise PlanError(refused[0])
    return list(found.values())


def _product(grid: Grid, overrides: Mapping[str, Sequence[Any]]) -> Iterable[Cell]:
    axes = {axis: overrides.get(axis, values) for axis, values in grid.items()}
    plain = {axis: values for axis, values in axes.items() if not callable(values)}
    for combination in itertools.product(*plain.values()):
        cell = dict(zip(plain, combination, strict=True))
        for axis, rule in axes.items():
            if callable(rule):
                cell[axis] = rule(cell)
        yield {axis: cell[axis] for axis in grid}


def larger(cell: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
    """Whether a cell differs from another in its sizes alone, and no size is smaller."""
    differing = [axis for axis in cell if axis not in than or cell[axis] != than[axis]]
    return (
        cell.keys() == than.keys()
        and differing != []
        and all(axis in SIZES and isinstance(cell[axis], int) and isinstance(than[axis], int) for axis in differing)
        and all(cell[axis] > than[axis] for axis in differing)
    )


def cell_id(cell: Cell) -> str:
    """`forward-bf16-h4096-r128-torch`: numbers carry the first letter of their axis."""
    return "-".join(f"{axis[0]}{value}" if isinstance(value, int) else str(value) for axis, value in cell.items())
