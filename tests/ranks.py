"""What tests/test_parallel.py starts on each rank: `ranks.py CONFIG.json`, a list of runs, of which some are sabotaged.

A run is TrainConfig's fields; "other", those that the second rank has otherwise, as on another machine; "sabotage":
true where gradients shall never be reduced over the ranks; "room", how many rows fit into the memory; and "error",
what each rank must say where the run cannot be.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tinylm import parallel
from tinylm.config import ConfigError
from tinylm.model import Transformer
from tinylm.train import TrainConfig, TrainingStopped, train

wrap = parallel.wrap


def wrap_without_reducing(*arguments: Any, **options: Any) -> parallel.Wrapped:
    wrapped = wrap(*arguments, **options)

    def reducing(last: bool) -> AbstractContextManager[Any]:
        return wrapped.reducing(False)

    return dataclasses.replace(wrapped, reducing=reducing)


def only(rows: int) -> Callable[..., Tensor]:
    """The model's forward pass, with memory for so many rows."""
    forward = Transformer.forward

    def limited(self: Transformer, tokens: Tensor, **options: Any) -> Tensor:
        if len(tokens) > rows:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return forward(self, tokens, **options)

    return limited


def main(path: Path) -> None:
    runs = json.loads(path.read_text())
    with parallel.ranks(runs[0]["parallel"], "cpu") as world:
        for run in runs:
            sabotage, error, room = run.pop("sabotage", False), run.pop("error", None), run.pop("room", 1000)
            other = run.pop("other", {})
            run |= other if world.rank else {}
            with (
                mock.patch.object(parallel, "wrap", wrap_without_reducing if sabotage else wrap),
                mock.patch.object(Transformer, "forward", only(room)),
                pytest.raises((ConfigError, TrainingStopped), match=error) if error else nullcontext(),
            ):
                train(TrainConfig(**run))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    parallel.leave(0)
