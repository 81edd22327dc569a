"""The decode loop: prefill, then a token at a time, with a cache or without one, eagerly or as CUDA graphs.

Shapes: B rows, T prompt tokens of the longest row, V vocab_size. Rows of different lengths are aligned on the
left: row b is its first lengths[b] tokens and then padding, which causality hides where there is no cache, and
the lengths of the rows where there is one. So every row has the positions, and the result, that it has alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tinylm.cache import Batch, Cache
from tinylm.config import ConfigError
from tinylm.generate.prompts import check_prompts, check_room
from tinylm.generate.sampling import Noise, Sampling, select
from tinylm.model import Transformer


@torch.inference_mode()
def prefill(
    model: Transformer,
    tokens: Tensor,
    cache: Cache,
    *,
    lengths: Sequence[int] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Puts prompts (B, T) into an empty cache, `chunk` tokens at a time (None: at once).

    lengths: of each row, the longest being T; None: all have T. Returns the logits of each row's last token,
    (B, 1, V). Raises ConfigError if the prompts pass the model's context or the cache's room.
    """
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk is {chunk}: expected at least 1 token")
    width = tokens.shape[1]
    logits = torch.empty(0)
    with _evaluating(model):
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


def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    cache: str | None = "dense",
    graph: bool = False,
    sampling: Sampling | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Continues prompts (B, T) int64 by max_new_tokens: (B, T + max_new_tokens). See also `Decoder`.

    For prompts of different lengths, and to stop at the end of text: `complete`.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    check_prompts(model, tokens)
    check_room(model, tokens.shape[1], max_new_tokens)
    decoder = Decoder(model, tokens, max_new_tokens - 1, cache=cache, graph=graph, sampling=sampling, chunk=chunk)
    rest = decoder.run(max_new_tokens - 1)
    return torch.cat((tokens.to(rest.device), decoder.first, rest), dim=1)


class Decoder:
    """A decode loop made ready: prompt prefilled, first token chosen, buffers allocated, graphs captured.

    What is left, `run`, is the work to time: each of its tokens is one pass of the model and one choice, and
    nothing waits for the host. `cache=None` is the honest baseline: it recomputes the whole prefix for every
    token, but projects only the last position to the vocabulary.

    static: steps read their place from device buffers and treat the prefix as padded to a multiple of
    `granularity` (with a cache, a mask hides the padding; without one, causality does), so that one sequence
    of kernels serves `granularity` tokens. granularity=1 needs no padding and no mask: SDPA's flash kernels,
    at a graph per token. graph: static, and captured as one CUDA graph per padded length.

    Prompts may be ragged: `lengths`. A row whose text reaches the model's context before the others' stays
    there: what it gives from then on means nothing.

    Raises ConfigError if the shortest prompt and max_new pass the model's context, for graph off a GPU, and
    for a cache layout, prompt or granularity that cannot be.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer,
        tokens: Tensor,  # (B, T) int64
        max_new: int,  # the most tokens that run may decode after `first`
        *,
        lengths: Sequence[int] | None = None,  # row b's prompt is tokens[b, :lengths[b]]; None: all of T tokens
        cache: str | None = "dense",
        graph: bool = False,
        static: bool = False,
        granularity: int = 16,
        sampling: Sampling | None = None,
        chunk: int | None = None,  # prefill this many tokens at a time; None: all
        vocab_size: int | None = None,  # ids from here on are never chosen (a padded vocabulary); None: the model's
    ) -> None:
        device = model.device
        if graph and device.type != "cuda":
            raise ConfigError(f"graph=True with a model on {device}: move the model to a CUDA device, or drop graph")
        if granularity < 1:
            raise ConfigError(f"granularity is {granularity}: expected at least 1 token")
        check_prompts(model, tokens, lengths)
        self.lengths = list(lengths) if lengths is not None else [tokens.shape[1]] * len(tokens)
        check_room(model, min(self.lengths), max_new)
        self.model, self.max_new, self.granularity = model, max_new, granularity
        self.sampling = sampling or Sampling()
        self.static = static or graph
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.prompt_tokens = max(self.lengths)  # of the longest row
        self.ragged = min(self.lengths) < self.prompt_tokens
        last = self.prompt_tokens + max_new
        self._passing = last > model.config.context  # then it is the longer ones of ragged rows that pass
        tokens = tokens[:, : self.prompt_tokens].to(device)
        # One more than the context, for the token that is chosen last and never read.
        self.ids = torch.zeros(len(tokens), max(last, self._bucket(last)) + 1, dtype=torch.int64, device=device)
        self.ids[:, : self.prompt_tokens] = tokens
        self._places = torch.arange(last + 1, device=device)
        self._first = torch.tensor(self.lengths, device=device)[:, None]  # the place of each row's first new token
        self._position = self._first.clone()  # of the newest token, for static steps
        self._noise: Noise | None = None
        self.vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        if self.sampling.temperature > 0:
            self._noise = Noise(self.sampling.seeds(len(tokens)), self.vocab_size, device)
        self.cache = None if cache is None else model.new_cache(cache, batch=len(tokens), context=self._bucket(last))
        with _evaluating(model):
            if self.cache is None:
                logits = model(tokens, last_index=self._first[:, 0] - 1)
            else:
                rows = self.lengths if self.ragged else None
                logits = prefill(model, tokens, self.cache, lengths=rows, chunk=chunk)
            self.ids.scatter_(1, self._first, self._select(logits, self._first))
            self.rewind()
            if graph:
                self._capture()

    @property
    def first(self) -> Tensor:
        """The token that prefill chose, (B, 1)."""
        with torch.inference_mode(False):
            return self.ids.gather(1, self._first)

    @torch.inference_mode()
    def run(self, tokens: int) -> Tensor:
        """Decodes that many more tokens of each row: (B, tokens) int64.

        Raises ConfigError past max_new since rewind.
        """
        done = self._known - self.prompt_tokens
        if not 0 <= tokens <= self.max_new - done:
            raise ConfigError(f"run({tokens}) after {done} of max_new={self.max_new} tokens: give fewer, or rewind")
        first = self._known + 1
        with _evaluating(self.model):
            for length in range(first, first + tokens):
                self._advance(length)
        self._known += tokens
        with torch.inference_mode(False):
            return self.ids.gather(1, self._first + self._places[done + 1 : done + 1 + tokens])

    @torch.inference_mode()
    def rewind(self) -> None:
        """Back to the state right after prefill: the next run does the same work with the same result."""
        self._known = self.prompt_tokens  # the longest row's newest token, which no pass has read yet
        self._position.copy_(self._first)

    def _select(self, logits: Tensor, places: Tensor) -> Tensor:
        """The tokens (B, 1) that come at places (B, 1) or (1,), of the logits (B, 1, V) before them."""
        noise = None if self._noise is None else self._noise.at(places)
        return select(logits[:, -1, : self.vocab_size], self.sampling, noise)[:, None]

    def _bucket(self, length: int) -> int:
        """What a prefix of this length is padded to, within the model's context."""
        if self.static:
            length = -(-length // self.granularity) * self.granularity
        return min(length, self.model.config.context)

    def _advance(self, length: int) -> None:
        """One more token after `length` known ones of the longest row."""
        if self._graphs:
            self._graphs[self._bucket(length)].replay()
        elif self.static or self.ragged:
            self._static_step(self._bucket(length))
        else:
            self._eager_step(length)

    def _eager_step(self, length: int) -> None:
        known = self.ids[:, :length]
        if self.cache is None:
            logits = self.model(known, last_only=True)
        else:
            position = self._places[length - 1 : length].expand(len(known), 1)
            lengths = self._places[length].expand(len(known))
            batch = Batch(known[:, -1:], position, lengths, span=length, uniform=True)
            logits = self.model.step(batch, self.cache)
        self.ids[:, length : length + 1] = self._select(logits, self._places[length : length + 1])

    def _static_step(self, span: int) -> None:
        """The same from device buffers alone, for any prefixes that fit `span`: what a graph captures."""
        position = self._position
        place = position.clamp(max=self.model.config.context - 1) if self._passing else position
        if self.cache is None:
            logits = self.model(self.ids[:, :span], last_index=place[:, 0])
        else:
            newest = self.ids.gather(1, position)
            uniform = self.granularity == 1 and not self.ragged
            logits = self.model.step(Batch(newest, place, place[:, 0] + 1, span=span, uniform=uniform), self.cache)
        # In place, and last: the pass above still reads the old position.
        position += 1
        self.ids.scatter_(1, position, self._select(logits, position))

    def _capture(self) -> None:
        """One graph per bucket, largest first, so that the smaller ones fit into the memory pool it leaves.

        Sharing one pool is safe in any order of replay: no result lives in it, each goes to ids, position or
        cache.
        """
        known = range(self.prompt_tokens + 1, self.prompt_tokens + self.max_new + 1)
        spans = sorted({self._bucket(length) for length in known}, reverse=True)
        device = self.model.device
        with torch.cuda.device(device):
            stream, pool = _side_stream(device), torch.cuda.graph_pool_handle()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Before, since a capture must meet nothing that is made at its first use (tables, plans,
                # compiled kernels). From the prompt's end, which is within every span; what a pass writes is
                # overwritten later.
                for span in spans:
                    self.rewind()
                    self._static_step(span)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            for span in spans:
                graph = torch.cuda.CUDAGraph()
                # thread_local: a thread that reads telemetry meanwhile does not spoil the capture
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self._static_step(span)
                self._graphs[span] = graph
        self.rewind()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all decoders: cuBLAS keeps a workspace for each stream that it ever met.
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """Without dropout, then as it was."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
