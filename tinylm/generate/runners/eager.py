"""Every kernel of every step launched from Python: runs anywhere, bound by the host where the model is small."""

from __future__ import annotations

from typing import ClassVar

from tinylm.generate.loop import Loop


class Eager:
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    granularity: ClassVar[int | None] = 1
    fallback: ClassVar[dict[str, str]] = {}
    stops = False

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def advance(self, known: int, tokens: int) -> None:
        loop = self._loop
        for length in range(known + 1, known + tokens + 1):
            loop.step(min(length, loop.model.config.context), exact=not loop.ragged)
