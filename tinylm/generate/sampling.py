"""How the next token is chosen: the likeliest, or drawn with noise that is a pure function of its place.

Shapes: B rows, V vocab_size.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.config import ConfigError

LEAST_TEMPERATURE = 1e-5  # logits of any model, divided by it, are still far from fp32's infinity


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ConfigError for values that cannot work."""

    temperature: float = 0.0  # 0: the likeliest token (greedy), whatever the rest says
    top_k: int | None = None  # only among the k likeliest (and those as likely as the last of them)
    top_p: float | None = None  # only among the fewest tokens whose probabilities sum to at least p
    seed: int | None = None  # of the first row; row b has seed + b. None: another one each time

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < float("inf")):
            raise ConfigError(
                f"temperature is {self.temperature}: expected 0 (greedy), or a number from {LEAST_TEMPERATURE} up"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}: expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: expected a number above 0, at most 1")

    def seeds(self, rows: int) -> list[int]:
        """The seed of each row: what the row alone is to be given for the same tokens."""
        first = secrets.randbits(48) if self.seed is None else self.seed
        return [first + row for row in range(rows)]


# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): its step, and the
# shifts and factors of its finalizer, as signed numbers. Wrapping products of int64 are those of uint64.
def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


STEP = _signed(0x9E3779B97F4A7C15)
ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
LAST_SHIFT = 31


def _xorshift(x: Tensor, shift: int) -> Tensor:
    """x ^ (x >>> shift): int64's own shift would draw the sign in."""
    return x ^ ((x >> shift) & ((1 << 64 - shift) - 1))


def splitmix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64, a bijection of int64: what follows any state looks random."""
    for shift, factor in ROUNDS:
        x = _xorshift(x, shift) * factor
    return _xorshift(x, LAST_SHIFT)


class Noise:
    """Noise of Exponential(1) for each row, position and token, from the row's seed alone.

    A row's noise is the SplitMix64 stream that its seed starts; token v of a place n takes number n V + v. So a
    row draws the same whatever is beside it in the batch, however far another row is, and with or without a
    CUDA graph; there is no state to save, and nothing waits for the host.
    """

    def __init__(self, seeds: Sequence[int], vocab_size: int, device: torch.device | str) -> None:
        first = torch.tensor([[_signed(seed)] for seed in seeds], device=device)
        self.starts = splitmix(first)  # (B, 1) int64: neighbouring seeds start far from each other
        self._tokens = torch.arange(vocab_size, device=device) * STEP
        self.stride = _signed(vocab_size * STEP)

    def at(self, places: Tensor) -> Tensor:
        """(B, V) fp32, positive and finite, for the tokens at places (B, 1) or (1,) int64 of their rows."""
        bits = splitmix(self.starts + places * self.stride + self._tokens) & ((1 << 63) - 1)
        # The smallest of the noise decide, so it is fine near 0: of 63 bits, where -log of a 24-bit uniform
        # has steps of 6e-8, too coarse for tokens of that probability. Not 0, since 0 / 0 would pick the
        # impossible; not 1, since the noise would be infinite.
        negative = bits.float().mul_(-(2.0**-63)).clamp_(-1 + 2.0**-24, -(2.0**-63))
        return negative.log1p_().neg_()


def select(logits: Tensor, sampling: Sampling, noise: Tensor | None = None) -> Tensor:
    """One token of each row: logits (B, V) -> ids (B,) int64, without a copy to the host.

    noise: (B, V) positive, of Exponential(1), as from `Noise.at`; needed unless greedy (else ConfigError).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if noise is None:
        raise ConfigError(f"temperature is {sampling.temperature} and no noise is given: give Noise(...).at(places)")
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
    # wait for the host.
    return (logits.softmax(-1) / noise).argmax(-1)
