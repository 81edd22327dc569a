"""Rows of the table of runners that tests alone need, and which rows can be tested here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch

from tinylm.generate.loop import Loop
from tinylm.generate.runners import RUNNERS, Compile, Graph

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Step:
    """Stands for the graph of a step: launches its kernels one by one."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.replay = step


class Uncaptured(Graph):
    """The steps that `graph` captures, with their padding and masks, where there is no GPU."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    @staticmethod
    def capture(loop: Loop, steps: Sequence[Callable[[], None]]) -> Any:
        return [Step(step) for step in steps]


class Traced(Compile):
    """`compile` as far as the compiler proper, which takes ten times as long as the rest."""

    backend: ClassVar[str | Callable[..., Any]] = "aot_eager"


@pytest.fixture(scope="module")
def rows() -> Iterator[None]:
    """The table with these rows too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNNERS, "uncaptured", Uncaptured)
        patch.setitem(RUNNERS, "traced", Traced)
        yield


def here(name: str) -> Any:
    """A runner as a test's parameter, skipped where the device is another one."""
    needs = RUNNERS[name].devices if name in RUNNERS else (DEVICE,)
    reason = f"runner {name} needs {' or '.join(needs)}, there is {DEVICE} alone"
    return pytest.param(name, marks=pytest.mark.skipif(DEVICE not in needs, reason=reason))


# `traced` for `compile`: one test compiles to the end.
EACH = [here(name) for name in [*RUNNERS, "uncaptured", "traced"] if name != "compile"]
