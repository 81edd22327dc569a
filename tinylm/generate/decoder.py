"""Prefill, then a token at a time, with a cache or without one, by a runner of `tinylm.generate.runners`.

Shapes: B rows, T prompt tokens of the longest row, V vocab_size. Rows of different lengths are aligned on the
left: row b is its first lengths[b] tokens and then padding, which causality hides where there is no cache, and
the lengths of the rows where there is one. So every row has the positions, and the result, that it has alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tinylm.cache import Cache
from tinylm.config import ConfigError
from tinylm.generate.filling import evaluating, fill
from tinylm.generate.loop import Loop
from tinylm.generate.prompts import check_prompts, check_room
from tinylm.generate.runners import choose, start
from tinylm.generate.sampling import Sampling
from tinylm.model import Transformer


def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    cache: str | None = "dense",
    runner: str = "eager",
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
    decoder = Decoder(model, tokens, max_new_tokens - 1, cache=cache, runner=runner, sampling=sampling, chunk=chunk)
    rest = decoder.run(max_new_tokens - 1)
    return torch.cat((tokens.to(rest.device), decoder.first, rest), dim=1)


class Decoder:
    """A decode loop made ready: prompt prefilled, first token chosen, buffers allocated, steps compiled, captured.

    What is left, `run`, is the work to time: each of its tokens is one pass of the model and one choice, and
    nothing waits for the host. `cache=None` is the honest baseline: it recomputes the whole prefix for every
    token, but projects only the last position to the vocabulary.

    runner: a row of `RUNNERS`: `eager`; `graph`, CUDA graphs; `compile`, torch.compile, which takes long at the
    first decoder of a shape, and CUDA graphs where there is a GPU. One that turns out not to run here gives way to
    its fallback, with a RunnerWarning; the attribute `runner` names what decodes.

    granularity: steps treat a prefix as padded to a multiple of so many tokens; None: as the runner likes. See
    the runners' files.

    Prompts may be ragged: `lengths`. A row whose text reaches the model's context before the others' stays
    there: what it gives from then on means nothing.

    Raises ConfigError if the shortest prompt and max_new pass the model's context, for a runner that is unknown
    or not for the model's device, and for a cache layout, prompt or granularity that cannot be.
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
        runner: str = "eager",
        granularity: int | None = None,
        sampling: Sampling | None = None,
        chunk: int | None = None,  # prefill this many tokens at a time; None: all
        vocab_size: int | None = None,  # ids from here on are never chosen (a padded vocabulary); None: the model's
        stop: Collection[int] = (),  # what follows one of these means nothing: a runner may leave it out
    ) -> None:
        kind = choose(runner, model.device.type)
        if granularity is not None and granularity < 1:
            raise ConfigError(f"granularity is {granularity}: expected at least 1 token")
        check_prompts(model, tokens, lengths)
        self.lengths = list(lengths) if lengths is not None else [tokens.shape[1]] * len(tokens)
        check_room(model, min(self.lengths), max_new)
        self.model, self.max_new = model, max_new
        tokens = tokens[:, : max(self.lengths)].to(model.device)
        self.loop = loop = Loop(
            model,
            tokens,
            self.lengths,
            max_new,
            cache=cache,
            granularity=granularity or kind.granularity,
            sampling=sampling or Sampling(),
            vocab_size=min(vocab_size or model.config.vocab_size, model.config.vocab_size),
            stop=stop,
        )
        self._places = torch.arange(max_new + 1, device=model.device)
        with evaluating(model):
            if loop.cache is None:
                logits = model(tokens, last_index=loop.first[:, 0] - 1)
            else:
                logits = fill(model, tokens, loop.cache, self.lengths if loop.ragged else None, chunk)
            loop.begin(logits)
            self.runner, self._runner = start(runner, loop)
        self.rewind()

    @property
    def ids(self) -> Tensor:
        """(B, at least T + max_new + 1): each row's prompt, and after it what was decoded."""
        return self.loop.ids

    @property
    def cache(self) -> Cache | None:
        return self.loop.cache

    @property
    def stops(self) -> bool:
        """Whether its runner does no more work once a token of `stop` is chosen."""
        return self._runner.stops

    @property
    def prompt_tokens(self) -> int:
        """Of the longest row."""
        return self.loop.prompt_tokens

    @property
    def first(self) -> Tensor:
        """The token that prefill chose, (B, 1)."""
        with torch.inference_mode(False):
            return self.loop.ids.gather(1, self.loop.first)

    @torch.inference_mode()
    def run(self, tokens: int) -> Tensor:
        """Decodes that many more tokens of each row: (B, tokens) int64.

        Raises ConfigError past max_new since rewind.
        """
        done = self._done
        if not 0 <= tokens <= self.max_new - done:
            raise ConfigError(f"run({tokens}) after {done} of max_new={self.max_new} tokens: give fewer, or rewind")
        with evaluating(self.model):
            self._runner.advance(self.prompt_tokens + done, tokens)
        self._done += tokens
        with torch.inference_mode(False):
            return self.loop.ids.gather(1, self.loop.first + self._places[done + 1 : done + 1 + tokens])

    @torch.inference_mode()
    def rewind(self) -> None:
        """Back to the state right after prefill: the next run does the same work with the same result."""
        self._done = 0  # tokens since `first`
        self.loop.rewind()
