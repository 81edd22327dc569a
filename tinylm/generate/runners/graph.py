"""Each step one CUDA graph: a single launch, whatever the number of kernels.

SDPA reads a span of the cache that is fixed when the graph is captured, so there is a graph for each padded
length; a mask hides the padding. By default a graph serves 16 tokens, from a length of 256 on up to an eighth of
the length, so that any text has a few dozen graphs. granularity 1: no padding and no mask, which SDPA's fastest
kernels ask for, at a graph per token. The model's context: one graph, which reads all of the cache each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from tinylm.generate.loop import Loop


def capture(
    device: torch.device,
    steps: Sequence[Callable[[], None]],
    rewind: Callable[[], None] = lambda: None,  # goes before each step that warms up
) -> list[torch.cuda.CUDAGraph]:
    """A graph of each step, the largest first, so that the smaller ones fit into the memory pool it leaves.

    Sharing one pool is safe in any order of replay as long as no result lives in it: a loop's go to its buffers
    or to its cache.
    """
    graphs = []
    with torch.cuda.device(device):
        stream, pool = _side_stream(device), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Before, since a capture must meet nothing that is made at its first use (tables, plans,
            # compiled kernels). A loop's steps go from the prompt's end, which is within every span; what a
            # pass writes is overwritten later.
            for step in steps:
                rewind()
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        for step in steps:
            graph = torch.cuda.CUDAGraph()
            # thread_local: a thread that reads telemetry meanwhile does not spoil the capture
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step()
            graphs.append(graph)
    return graphs


class Graph:
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    granularity: ClassVar[int | None] = None
    fallback: ClassVar[dict[str, str]] = {}
    stops = False
    capture = staticmethod(capture)

    def __init__(self, loop: Loop) -> None:
        self._loop, exact = loop, loop.granularity == 1 and not loop.ragged
        steps = [functools.partial(loop.step, span, exact) for span in loop.spans]
        graphs = self.capture(loop.model.device, steps, loop.rewind)
        self._graphs = dict(zip(loop.spans, graphs, strict=True))

    def advance(self, known: int, tokens: int) -> None:
        for length in range(known + 1, known + tokens + 1):
            self._graphs[self._loop.padded(length)].replay()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all that is captured: cuBLAS keeps a workspace for each stream that it ever met.
    return torch.cuda.Stream(device)
