"""The options of the plugin, in a way that leaves alone the suites which have options of their own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tinylm.bench import plan
from tinylm.bench.results import BadInput

# option -> field of `timing.Limits`
LIMITS = {
    "--min-samples": "min_samples",
    "--max-samples": "max_samples",
    "--cell-seconds": "seconds",
    "--ci-width": "width",
    "--clock-share": "clock_share",
    "--threshold": "threshold",
}


def _share(text: str) -> float:
    from tinylm.bench.compare import fraction

    try:
        return fraction(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


OWN: dict[str, dict[str, Any]] = {
    "--gpu-label": {"metavar": "NAME", "help": "label of this run (default: from the device's name)"},
    "--preset-size": {"choices": plan.RUNGS, "help": "how large (default: from the device's memory)"},
    "--min-samples": {"type": int, "metavar": "N", "help": "fewest samples of a cell"},
    "--max-samples": {"type": int, "metavar": "N", "help": "most samples of a cell"},
    "--cell-seconds": {"type": float, "metavar": "S", "help": "stop sampling a cell after this time"},
    "--ci-width": {"type": _share, "metavar": "W", "help": "stop once the median is known to this (0.5%%)"},
    "--clock-share": {"type": _share, "metavar": "W", "help": "repeat a block below this clock (75%%)"},
    "--resume": {"metavar": "FILE", "type": Path, "help": "take over the finished cells of this JSON or journal"},
    "--in-process": {"action": "store_true", "help": "a cell that crashes ends the run, instead of a restart"},
}
# Names that other suites have too (a conftest's `--device`). These are added last of all, with the prefix `--tinylm-`
# where the name is taken by then: no suite is to break because this plugin is installed.
COMMON: dict[str, dict[str, Any]] = {
    "--device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "where to measure"},
    "--threshold": {"type": _share, "metavar": "W", "help": "the least difference of peers (0.5%%; CPU: 2%%)"},
    "--energy": {"action": "store_true", "help": "measure joules too: some 5 s more for each cell"},
    "--retry": {"action": "store_true", "help": "with --resume: all but the measured cells once more"},
    "--profile": {"choices": ("torch", "ncu"), "help": "a trace or report of each cell, instead of a timing"},
    **{plan.option(axis): {"metavar": "A,B", "help": f"these values of {axis} instead"} for axis in plan.AXES},
}


def add(parser: pytest.Parser, options: Mapping[str, Mapping[str, Any]]) -> None:
    """OWN or COMMON."""
    group = parser.getgroup("tinylm", "measuring (tinylm)")
    free = _free(parser, list(options)) if options is COMMON else options
    for name, about in options.items():
        group.addoption(name if name in free else name.replace("--", "--tinylm-", 1), dest=_dest(name), **about)


def _free(parser: pytest.Parser, names: list[str]) -> set[str]:
    """The options among these that nobody has yet."""
    try:
        unknown = parser.parse_known_and_unknown_args([f"{name}=0" for name in names])[1]
    except Exception:  # 0 is no value of one of them
        return set().union(*(_free(parser, [name]) for name in names)) if len(names) > 1 else set()
    return {argument.partition("=")[0] for argument in unknown}


def _dest(option: str) -> str:
    return "tinylm_" + option.strip("-").replace("-", "_")


def given(config: pytest.Config, option: str) -> Any:
    """The value of an option, by the name that it has where that is free."""
    return config.getoption(_dest(option))
