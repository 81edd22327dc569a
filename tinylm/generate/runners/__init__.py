"""How a decode loop's steps reach the device. A runner is one file here and one row of `RUNNERS`.

All choose the same tokens, to rounding: they launch one step, `Loop.step`, or do its work in their own way.
"""

from __future__ import annotations

import warnings

from tinylm.config import ConfigError
from tinylm.generate.loop import Loop
from tinylm.generate.runners.compile import Compile
from tinylm.generate.runners.eager import Eager
from tinylm.generate.runners.fused import Fused
from tinylm.generate.runners.graph import Graph
from tinylm.generate.runners.matvec import MatVec
from tinylm.generate.runners.protocol import Runner, RunnerWarning, Unable

__all__ = ["RUNNERS", "Runner", "RunnerWarning", "Unable", "choose", "start"]

RUNNERS: dict[str, type[Runner]] = {
    "eager": Eager,
    "graph": Graph,
    "compile": Compile,
    "fused": Fused,
    "matvec": MatVec,
}


def choose(name: str, device: str) -> type[Runner]:
    """The row `name`. Raises ConfigError for one that is not there, or that this type of device cannot run."""
    if name not in RUNNERS:
        raise ConfigError(f"unknown runner {name!r}: use one of {', '.join(RUNNERS)}")
    runner = RUNNERS[name]
    if device not in runner.devices:
        here = [name for name, other in RUNNERS.items() if device in other.devices]
        raise ConfigError(
            f"runner {name!r} with a model on {device}: it runs on {', '.join(runner.devices)}; move the model there, "
            f"or use one of {', '.join(here)}"
        )
    return runner


def start(name: str, loop: Loop) -> tuple[str, Runner]:
    """The runner `name`, or with a RunnerWarning what it falls back to; and which of them it is."""
    device = loop.model.device.type
    runner = choose(name, device)
    try:
        return name, runner(loop)
    except Unable as reason:
        instead = runner.fallback[device]
        told = f"runner {name!r} cannot run: {reason}; {instead!r} decodes instead"
        warnings.warn(told, RunnerWarning, stacklevel=4)  # who made the Decoder
    return start(instead, loop)
