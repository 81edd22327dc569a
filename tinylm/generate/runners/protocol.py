"""What a runner is: it launches the steps of one decode loop."""

from __future__ import annotations

from typing import ClassVar, Protocol

from tinylm.generate.loop import Loop


class Runner(Protocol):
    """Made for a loop whose prompt is prefilled: what takes long, compiling and capturing, is done then.

    Raises Unable where that fails. Steps that it makes meanwhile are its caller's to rewind.
    """

    devices: ClassVar[tuple[str, ...]]  # types of device that it can run on
    granularity: ClassVar[int | None]  # of the loop, where none is asked for
    fallback: ClassVar[dict[str, str]]  # by type of device: the runner to take where this one is unable
    stops: bool  # whether it does no more work once a token of loop.stop is chosen

    def __init__(self, loop: Loop) -> None: ...

    def advance(self, known: int, tokens: int) -> None:
        """So many more tokens of each row, after `known` that passes have read of the longest one.

        Queues them, and waits for nothing.
        """


class Unable(Exception):
    """Raised when a runner is made: one line, why it cannot run here."""


class RunnerWarning(UserWarning):
    """Another runner decodes than was asked for. One line: which, why, and what does instead."""
