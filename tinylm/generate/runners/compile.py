"""The step through torch.compile, choice of the token included; on a GPU captured as one CUDA graph.

One step serves the whole run: it reads the cache up to the longest prefix to come and masks what is not there yet,
because each span would be compiled by itself. The first loop of a shape compiles, for some 10 to 100 s, when its
decoder is made; later ones of the same shape in the process take the same code.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from tinylm.generate.loop import Loop
from tinylm.generate.runners.graph import capture
from tinylm.generate.runners.protocol import Unable
from tinylm.ops.compiling import compiler

# Matrix-vector products become generated kernels, fused with their neighbours, only where these are tuned.
OPTIONS: dict[str, dict[str, Any]] = {"cuda": {"coordinate_descent_tuning": True}}


class Compile:
    devices: ClassVar[tuple[str, ...]] = ("cuda", "cpu")
    granularity: ClassVar[int | None] = 64  # so that texts of similar length share their code
    fallback: ClassVar[dict[str, str]] = {"cpu": "eager", "cuda": "graph"}
    stops = False
    backend: ClassVar[str | Callable[..., Any]] = "inductor"

    def __init__(self, loop: Loop) -> None:
        if not loop.max_new:
            return
        span = loop.spans[0]
        step = _compiler(self.backend, loop.model.device.type)(_advance, span, *_shape(loop))
        self._step: Callable[[], Any] = functools.partial(step, loop, span)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler warns of what torch itself does
            try:
                self._step()  # compiles
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever stops a compiler is a reason to tell, and no reason to end
                raise Unable(_told(error)) from None
        device = loop.model.device
        if device.type == "cuda":
            self._step = capture(device, [self._step], loop.rewind)[0].replay

    def advance(self, known: int, tokens: int) -> None:
        for _ in range(tokens):
            self._step()


def _shape(loop: Loop) -> tuple[object, ...]:
    """What the code of a step depends on, besides its span."""
    model = loop.model
    return (
        model.config,
        tuple(model.ops.items()),
        model.device,
        model.dtype,
        loop.ids.shape,
        None if loop.cache is None else type(loop.cache),
        (loop.sampling.temperature, loop.sampling.top_k, loop.sampling.top_p, loop.vocab_size),
        loop.passing,
    )


@functools.cache
def _compiler(backend: str | Callable[..., Any], device: str) -> Callable[..., Callable[..., Any]]:
    return compiler(backend, OPTIONS.get(device) if backend == "inductor" else None)


def _advance(loop: Loop, span: int) -> None:
    loop.step(span)


def _told(error: Exception) -> str:
    """The first lines of a compiler's message, as one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' '.join(lines[: 2 if lines[0].endswith(':') else 1])}"[:300]
