"""Runners under test: rows of the table that tests alone need, which ones can run here, and what they are given."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from scipy import stats
from torch import Tensor

from tinylm.generate import Decoder
from tinylm.generate.runners import RUNNERS, Compile, Graph
from tinylm.model import Transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RARE = 1e-6  # a sound sampler fails a test at this level once in a million seeds; the seeds are fixed


class Step:
    """Stands for the graph of a step: launches its kernels one by one."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.replay = step


class Uncaptured(Graph):
    """The steps that `graph` captures, with their padding and masks, where there is no GPU."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    @staticmethod
    def capture(device: torch.device, steps: Sequence[Callable[[], None]], rewind: Any = None) -> Any:
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


@contextlib.contextmanager
def never_synchronizing() -> Iterator[None]:
    """What waits for the GPU in here raises RuntimeError, as far as torch sees it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)  # torch, of the mode itself
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def here(name: str) -> Any:
    """A runner as a test's parameter, skipped where the device is another one."""
    needs = RUNNERS[name].devices if name in RUNNERS else (DEVICE,)
    reason = f"runner {name} needs {' or '.join(needs)}, there is {DEVICE} alone"
    return pytest.param(name, marks=pytest.mark.skipif(DEVICE not in needs, reason=reason))


# These do one row in 16 bits: they have tests of their own.
ONE_ROW = ("fused", "matvec")
ALL = [here(name) for name in [*RUNNERS, "uncaptured", "traced"]]
# On a CPU `traced` stands for `compile`, and one test compiles to the end.
EACH = [
    here(name)
    for name in [*RUNNERS, "uncaptured", "traced"]
    if name not in ONE_ROW and (name != "compile" or DEVICE == "cuda")
]
# Those that compile anew for each shape, which takes long.
COMPILING = ("compile", "traced")


def prompts_of(model: Transformer, rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def decoded(decoder: Decoder) -> Tensor:
    return torch.cat((decoder.first, decoder.run(decoder.max_new)), 1)


def chi_square(found: Tensor, expected: Tensor) -> float:
    """The p-value of counts. scipy before 1.15 always wants the same sum of both, to rounding in fp64."""
    expected = expected.double()
    return float(stats.chisquare(found.double().numpy(), (expected * (found.sum() / expected.sum())).numpy()).pvalue)
