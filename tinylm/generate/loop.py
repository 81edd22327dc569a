"""What a decode loop reads and writes, on the device, and its one step. Runners differ in how they launch it.

Shapes: B rows, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tinylm.cache import Batch, Cache
from tinylm.generate.sampling import Noise, Sampling, select
from tinylm.model import Transformer


class Loop:
    """The buffers of B rows of which prompts (B, T) are known, row b's being tokens[b, :lengths[b]].

    A prefix may be treated as padded to a multiple of `granularity`, so that one sequence of kernels serves that
    many lengths: with a cache a mask hides the padding, without one causality does. 1: no padding. None: multiples
    that grow with the length, to an eighth of it, so that a long text has few of them.
    """

    def __init__(
        self,
        model: Transformer,
        tokens: Tensor,  # (B, T) int64, T = max(lengths)
        lengths: Sequence[int],
        max_new: int,  # the most tokens that follow the first one
        *,
        cache: str | None,  # layout; None: the whole prefix is computed again for each token
        granularity: int | None,
        sampling: Sampling,
        vocab_size: int,  # ids from here on are never chosen
        stop: Collection[int] = (),  # what follows one of these means nothing
    ) -> None:
        self.model, self.max_new, self.granularity = model, max_new, granularity
        self.sampling, self.vocab_size, self.stop = sampling, vocab_size, frozenset(stop)
        self.prompt_tokens = max(lengths)  # of the longest row
        self.ragged = min(lengths) < self.prompt_tokens
        last = self.prompt_tokens + max_new
        self.passing = last > model.config.context  # then it is the longer ones of ragged rows that pass
        device = model.device
        # One more than the context, for the token that is chosen last and never read.
        self.ids = torch.zeros(len(tokens), max(last, self.padded(last)) + 1, dtype=torch.int64, device=device)
        self.ids[:, : self.prompt_tokens] = tokens
        self._rows = torch.arange(len(tokens), device=device)[:, None]
        self.first = torch.tensor(lengths, device=device)[:, None]  # (B, 1): the place of each row's first new token
        self.position = self.first.clone()  # (B, 1): of each row's newest token, which no pass has read yet
        self.noise = Noise(sampling.seeds(len(tokens)), vocab_size, device) if sampling.temperature else None
        self.cache: Cache | None = None
        if cache is not None:
            self.cache = model.new_cache(cache, batch=len(tokens), context=self.padded(last))

    @property
    def spans(self) -> list[int]:
        """What the prefixes to come are padded to, the longest first."""
        known = range(self.prompt_tokens + 1, self.prompt_tokens + self.max_new + 1)
        return sorted({self.padded(length) for length in known}, reverse=True)

    def padded(self, length: int) -> int:
        """What a prefix of this length is padded to, within the model's context."""
        multiple = self.granularity or max(16, 1 << length.bit_length() >> 4)
        return min(-(-length // multiple) * multiple, self.model.config.context)

    def rewind(self) -> None:
        """Back to the state right after prefill."""
        self.position.copy_(self.first)

    def begin(self, logits: Tensor) -> None:
        """Chooses the first new token of each row, of prefill's logits (B, 1, V)."""
        self.ids[self._rows, self.first] = self._choose(logits, self.first)

    def step(self, span: int, exact: bool = False) -> None:
        """One more token of each row, read and written in device buffers alone: no host value but `span` enters.

        No row's prefix is longer than span; exact: every row's is as long, so that attention needs no mask.
        """
        position = self.position
        place = position.clamp(max=self.model.config.context - 1) if self.passing else position
        if self.cache is None:
            logits = self.model(self.ids[:, :span], last_index=place[:, 0])
        else:
            newest = self.ids.gather(1, position)
            logits = self.model.step(Batch(newest, place, place[:, 0] + 1, span=span, uniform=exact), self.cache)
        self.take(logits)

    def take(self, logits: Tensor) -> None:
        """Chooses each row's next token, of its newest one's logits (B, 1, at least vocab_size), and moves on."""
        position = self.position
        position += 1  # in place, and last: the pass before still read the old one
        # By index: scatter_ becomes a copy of all ids where it is compiled.
        self.ids[self._rows, position] = self._choose(logits, position)

    def _choose(self, logits: Tensor, places: Tensor) -> Tensor:
        """The tokens (B, 1) that come at places (B, 1), of the logits (B, 1, V) before them."""
        noise = None if self.noise is None else self.noise.at(places)
        return select(logits[:, -1, : self.vocab_size], self.sampling, noise)[:, None]
