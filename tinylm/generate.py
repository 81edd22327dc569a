"""Generation: prefill, decode with a cache or without one, sampling.

Shapes: B rows, T prompt tokens, V vocab_size. Every row of a prompt has the same length.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.cache import Batch, Cache
from tinylm.config import ConfigError
from tinylm.model import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ConfigError for values that cannot work."""

    temperature: float = 0.0  # 0: the likeliest token (greedy), whatever the rest says
    top_k: int | None = None  # only among the k likeliest (and those as likely as the last of them)
    top_p: float | None = None  # only among the fewest tokens whose probabilities sum to at least p
    seed: int | None = None  # None: another one each time

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}: expected 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}: expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: expected a number above 0, at most 1")


def select(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token of each row: logits (B, V) -> ids (B,) int64, without a copy to the host."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(before >= sampling.top_p, -torch.inf))
    # argmax(p / Exp(1)) draws from p, as the smallest of exponentials with rates p. torch.multinomial would
    # wait for the host. The clamp: a noise of 0 would pick a token of probability 0, by 0 / 0.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise.clamp_min_(torch.finfo(noise.dtype).tiny)).argmax(-1)


@torch.inference_mode()
def prefill(model: Transformer, tokens: Tensor, cache: Cache, *, chunk: int | None = None) -> Tensor:
    """Puts a prompt (B, T) into an empty cache, `chunk` tokens at a time (None: at once).

    Returns the logits of its last token, (B, 1, V). Raises ConfigError if it passes the model's context or
    the cache's room.
    """
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk is {chunk}: expected at least 1 token")
    logits = torch.empty(0)
    with _evaluating(model):
        for start in range(0, tokens.shape[1], chunk or tokens.shape[1]):
            part = tokens[:, start : start + chunk] if chunk else tokens
            logits = model.step(Batch.at(part, start), cache)
    return logits


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
    """Continues prompts (B, T) int64 by max_new_tokens: (B, T + max_new_tokens). See also `Decoder`."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    _check_room(model, tokens, max_new_tokens)
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

    Raises ConfigError if T + max_new passes the model's context, for graph off a GPU, and for a cache layout,
    prompt or granularity that cannot be.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer,
        tokens: Tensor,  # (B, T) int64
        max_new: int,  # the most tokens that run may decode after `first`
        *,
        cache: str | None = "dense",
        graph: bool = False,
        static: bool = False,
        granularity: int = 16,
        sampling: Sampling | None = None,
        chunk: int | None = None,  # prefill this many tokens at a time; None: all
    ) -> None:
        device = model.device
        if graph and device.type != "cuda":
            raise ConfigError(f"graph=True with a model on {device}: move the model to a CUDA device, or drop graph")
        if granularity < 1:
            raise ConfigError(f"granularity is {granularity}: expected at least 1 token")
        _check_room(model, tokens, max_new)
        self.model, self.max_new, self.granularity = model, max_new, granularity
        self.sampling = sampling or Sampling()
        self.static = static or graph
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        rows, self.prompt_tokens = tokens.shape
        last = self.prompt_tokens + max_new
        # One more than the context, for the token that is chosen last and never read.
        self.ids = torch.zeros(rows, max(last, self._bucket(last)) + 1, dtype=torch.int64, device=device)
        self.ids[:, : self.prompt_tokens] = tokens
        self._places = torch.arange(last + 1, device=device)
        # Of the newest token, for static steps.
        self._position = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._generator = self._make_generator()
        self.cache = None if cache is None else model.new_cache(cache, batch=rows, context=self._bucket(last))
        with _evaluating(model):
            if self.cache is None:
                logits = model(self.ids[:, : self.prompt_tokens], last_only=True)
            else:
                logits = prefill(model, self.ids[:, : self.prompt_tokens], self.cache, chunk=chunk)
            self.ids[:, self.prompt_tokens] = self._select(logits)
            self._random_state = None if self._generator is None else self._generator.get_state()
            self.rewind()
            if graph:
                self._capture()

    @property
    def first(self) -> Tensor:
        """The token that prefill chose, (B, 1)."""
        with torch.inference_mode(False):
            return self.ids[:, self.prompt_tokens : self.prompt_tokens + 1].clone()

    @torch.inference_mode()
    def run(self, tokens: int) -> Tensor:
        """Decodes that many more tokens: (B, tokens) int64. Raises ConfigError past max_new since rewind."""
        done = self._known - self.prompt_tokens
        if not 0 <= tokens <= self.max_new - done:
            raise ConfigError(f"run({tokens}) after {done} of max_new={self.max_new} tokens: give fewer, or rewind")
        first = self._known + 1
        with _evaluating(self.model):
            for length in range(first, first + tokens):
                self._advance(length)
        self._known += tokens
        with torch.inference_mode(False):
            return self.ids[:, first : first + tokens].clone()

    @torch.inference_mode()
    def rewind(self) -> None:
        """Back to the state right after prefill: the next run does the same work with the same result."""
        self._known = self.prompt_tokens  # the position of the newest token, which no pass has read yet
        self._position.fill_(self.prompt_tokens)
        if self._generator is not None and self._random_state is not None:
            self._generator.set_state(self._random_state)

    def _make_generator(self) -> torch.Generator | None:
        if self.sampling.temperature == 0:
            return None
        generator = torch.Generator(self.model.device)
        if self.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.sampling.seed)
        return generator

    def _select(self, logits: Tensor) -> Tensor:
        return select(logits[:, -1], self.sampling, self._generator)

    def _bucket(self, length: int) -> int:
        """What a prefix of this length is padded to."""
        if not self.static:
            return length
        return min(-(-length // self.granularity) * self.granularity, self.model.config.context)

    def _advance(self, length: int) -> None:
        """One more token after `length` known ones."""
        if not self.static:
            self._eager_step(length)
        elif self._graphs:
            self._graphs[self._bucket(length)].replay()
        else:
            self._static_step(self._bucket(length))

    def _eager_step(self, length: int) -> None:
        known = self.ids[:, :length]
        if self.cache is None:
            logits = self.model(known, last_only=True)
        else:
            position = self._places[length - 1 : length].expand(len(known), 1)
            lengths = self._places[length].expand(len(known))
            batch = Batch(known[:, -1:], position, lengths, span=length, uniform=True)
            logits = self.model.step(batch, self.cache)
        self.ids[:, length] = self._select(logits)

    def _static_step(self, span: int) -> None:
        """The same from device buffers alone, for any prefix that fits `span`: what a graph captures."""
        position = self._position
        if self.cache is None:
            logits = self.model(self.ids[:, :span], last_index=position[:, 0])
        else:
            newest = self.ids.gather(1, position)
            batch = Batch(newest, position, position[:, 0] + 1, span=span, uniform=self.granularity == 1)
            logits = self.model.step(batch, self.cache)
        # In place, and last: the pass above still reads the old position.
        position += 1
        self.ids.scatter_(1, position, self._select(logits)[:, None])

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
                if self._generator is not None:
                    graph.register_generator_state(self._generator)
                # thread_local: a thread that reads telemetry meanwhile does not spoil the capture
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self._static_step(span)
                self._graphs[span] = graph
        self.rewind()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all decoders: cuBLAS keeps a workspace for each stream that it ever met.
    return torch.cuda.Stream(device)


def _check_room(model: Transformer, tokens: Tensor, new: int) -> None:
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.dtype != torch.int64:
        raise ConfigError(
            f"a prompt of {tuple(tokens.shape)}, {tokens.dtype}: expected int64 (rows, tokens), not empty"
        )
    if new < 0 or tokens.shape[1] + new > model.config.context:
        raise ConfigError(
            f"{tokens.shape[1]} prompt tokens and {new} new ones do not fit the model's context of "
            f"{model.config.context}: give fewer, or a config with a larger context"
        )
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= model.config.vocab_size:
        raise ConfigError(f"token ids run from {low} to {high}: expected 0 to {model.config.vocab_size - 1}")


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
