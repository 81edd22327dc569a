"""Prefill: prompts into an empty cache, as they come, or of one shape by a pass that was compiled for it.

Shapes: B rows, T prompt tokens of the longest row, V vocab_size. Rows of different lengths: see `decoder`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tinylm.attention import Rope
from tinylm.cache import Batch, Cache
from tinylm.config import ConfigError
from tinylm.generate.prompts import check_prompts
from tinylm.generate.runners.graph import capture
from tinylm.model import Transformer
from tinylm.ops.compiling import compiler


@torch.inference_mode()
def prefill(
    model: Transformer,
    tokens: Tensor,
    cache: Cache,
    *,
    lengths: Sequence[int] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Puts prompts (B, T) int64, on any device, into an empty cache, `chunk` tokens at a time (None: at once).

    lengths: of each row, the longest being T; None: all have T. Returns the logits of each row's last token, (B, 1, V).
    Raises ConfigError, before anything is computed, for what is no prompt of the model, and for a cache of another
    model or device or without the room. A prompt on a GPU is waited for, to see that its ids are tokens.
    """
    _check(model, tokens, cache, lengths)
    return fill(model, tokens.to(model.device), cache, lengths, chunk)


class CompiledPrefill:
    """`prefill` of prompts (batch, tokens), all of that length, into one cache: compiled, on a GPU as one CUDA graph.

    What is left, `run`, is the work to time. Compiling takes some 10 to 100 s at the first of a shape in the process.
    A graph keeps the memory that a pass needs, and the addresses that it was captured with: weights may change in
    place, but not move.

    The cache is empty once this is made, whatever was in it. Raises ConfigError as `prefill` does, and leaves the
    cache alone then.
    """

    @torch.inference_mode()
    def __init__(self, model: Transformer, cache: Cache, batch: int, tokens: int) -> None:
        if batch < 1 or tokens < 1:
            raise ConfigError(f"prompts of {batch} rows of {tokens} tokens: give at least 1 of each")
        self.model, self.cache = model, cache
        self._tokens = torch.zeros(batch, tokens, dtype=torch.int64, device=model.device)  # what the pass reads
        _check(model, self._tokens, cache)
        self._batch = Batch.at(self._tokens, 0)  # a graph reads its tensors where they are, and keeps none of them
        step = functools.partial(_compiled_step(model, self._tokens, cache), model, self._batch, cache)
        with evaluating(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler warns of what torch itself does
            step()  # compiles
            self._step: Callable[[], Tensor] = _captured(model.device, step) if model.device.type == "cuda" else step
        cache.reset()

    @torch.inference_mode()
    def run(self, tokens: Tensor) -> Tensor:
        """Puts prompts (B, T) int64, on any device, into the cache from its start, whatever else is in it.

        Returns the logits of each row's last token, (B, 1, V), in memory that the next run may write again. Raises
        ConfigError, before anything is computed, for what is no prompt of the model or of another shape.
        """
        if tokens.shape != self._tokens.shape:
            raise ConfigError(
                f"a prompt of {tuple(tokens.shape)} where {tuple(self._tokens.shape)} is compiled: "
                "make a CompiledPrefill for its shape, or use prefill"
            )
        _check(self.model, tokens, self.cache)
        self._tokens.copy_(tokens)
        with evaluating(self.model):
            return self._step()


def _check(model: Transformer, tokens: Tensor, cache: Cache, lengths: Sequence[int] | None = None) -> None:
    check_prompts(model, tokens, lengths)
    model.check_cache(cache)
    cache.check_room(*tokens.shape)  # of all of it: a later part would find out when the first ones are written


def _compiled_step(model: Transformer, tokens: Tensor, cache: Cache) -> Callable[..., Tensor]:
    if isinstance(model.positions, Rope):
        model.positions.tables(model.device, model.dtype)  # made while it is traced, they would have it traced again
    shape = (tokens.shape, type(cache), cache.nbytes, cache.dtype)
    return _compile(_model_step, model.config, tuple(model.ops.items()), model.device, model.dtype, *shape)


def _model_step(model: Transformer, batch: Batch, cache: Cache) -> Tensor:
    return model.step(batch, cache)


_compile = compiler("inductor")


def _captured(device: torch.device, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a graph's replay, whose result lies in the graph's own memory."""
    result = torch.empty(0)

    def kept() -> None:
        nonlocal result
        result = step()  # the last time while it is captured

    (graph,) = capture(device, [kept])

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def fill(model: Transformer, tokens: Tensor, cache: Cache, lengths: Sequence[int] | None, chunk: int | None) -> Tensor:
    """`prefill` of prompts that were checked, on the model's device."""
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk is {chunk}: expected at least 1 token")
    width = tokens.shape[1]
    logits = torch.empty(0)
    with evaluating(model):
        for start in range(0, width, chunk or width):
            stop = min(start + (chunk or width), width)
            if lengths is None:
                batch = Batch.at(tokens[:, start:stop], start)
            else:
                batch = _ragged_part(tokens, lengths, start, stop)
            logits = model.step(batch, cache)
    return logits


def _ragged_part(tokens: Tensor, lengths: Sequence[int], start: int, stop: int) -> Batch:
    """Tokens start..stop of each row. One that ended before gives its last token again, to the same place: so
    the last part has the last token of every row."""
    starts = [min(start, length - 1) for length in lengths]
    counts = [min(stop - start, length - first) for first, length in zip(starts, lengths, strict=True)]
    places = torch.tensor(starts, device=tokens.device)[:, None] + torch.arange(stop - start, device=tokens.device)
    return Batch.ragged(tokens.gather(1, places), starts, counts)


@contextlib.contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Without dropout, then as it was."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
