"""Windows of tokens: drawn for training, cut for evaluation.

Which tokens training sample i holds is a pure function of (seed, i): a run can stop anywhere and go on, on
another number of ranks too, without a word about the past.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tinylm.config import ConfigError
from tinylm.data.tokens import Tokens

IGNORED = -100  # a target that is not scored, by torch's own convention: ignore_index of F.cross_entropy
ROUNDS = 6  # of the permutation; four are the fewest that are as good as random (Luby and Rackoff, 1988)
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: SplitMix64's step


class Sampler:
    """Training windows of context + 1 tokens: sample i is a pure function of (seed, i).

    Each pass over the text (an epoch of `windows` samples) cuts it, from a start of its own, into windows that
    share only the token that is the last target of one and the first input of the next, and visits every window
    once, in an order of its own. The order is a keyed permutation of the windows' numbers and so needs no memory.
    Raises ConfigError for a text shorter than one window.
    """

    def __init__(self, tokens: Tokens, context: int, seed: int) -> None:
        _check_length(tokens, context)
        self.tokens, self.context, self.seed = tokens, context, seed
        # One window fewer than fit, so that the start has at least `context` places to be at.
        self.windows = max((len(tokens) - 1) // context - 1, 1)
        self._starts = len(tokens) - self.windows * context

    def samples(self, first: int, count: int) -> Tensor:
        """Samples first to first + count - 1: (count, context + 1) int64."""
        return torch.from_numpy(self.tokens.read(self.starts(first, count), self.context + 1))

    def starts(self, first: int, count: int) -> np.ndarray:
        """Where those samples start in the text, (count,) int64."""
        epochs, places = np.divmod(np.arange(first, first + count, dtype=np.uint64), np.uint64(self.windows))
        keys = _mix(_mix(epochs) ^ np.uint64(self.seed % 2**64))
        offsets = _mix(keys) % np.uint64(self._starts)
        return (offsets + permuted(places, self.windows, keys) * np.uint64(self.context)).astype(np.int64)


def permuted(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """places, (N,) uint64 below `size`, each by the permutation of 0..size-1 that its key (N,) uint64 names.

    A Feistel network over a x b >= size, a and b near the root of size, followed again while the result is not
    below size (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    a = int(np.ceil(np.sqrt(size)))
    b = -(-size // a)
    found, left = places.copy(), np.arange(len(places))
    while len(left):
        moved = _feistel(found[left], keys[left], np.uint64(a), np.uint64(b))
        found[left] = moved
        left = left[moved >= size]
    return found


def _feistel(values: np.ndarray, keys: np.ndarray, a: np.uint64, b: np.uint64) -> np.ndarray:
    for number in range(ROUNDS):
        left, right = np.divmod(values, b)
        step = np.uint64(number * GOLDEN % 2**64)
        values = right * a + (left + _mix(keys + _mix(right + step)) % a) % a
        a, b = b, a
    return values


def _mix(values: np.ndarray) -> np.ndarray:
    """A hash of each uint64: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = values + np.uint64(GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def eval_windows(tokens: Tokens, context: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets), each (batch, context) int64, over the whole text without overlap.

    Every token but the first is a target exactly once. What fills up the last window and the last batch is input
    0 with target -100. Raises ConfigError for a text shorter than one window.
    """
    _check_length(tokens, context)
    targets = len(tokens) - 1
    windows = -(-targets // context)
    for first in range(0, windows, batch):
        start = first * context
        stop = min(start + batch * context, targets)
        read = torch.from_numpy(tokens.read(np.array([start]), stop - start + 1)[0])
        inputs = torch.zeros(batch * context, dtype=torch.int64)
        wanted = torch.full_like(inputs, IGNORED)
        inputs[: stop - start], wanted[: stop - start] = read[:-1], read[1:]
        yield inputs.view(batch, context), wanted.view(batch, context)


def _check_length(tokens: Tokens, context: int) -> None:
    if context < 1:
        raise ConfigError(f"context is {context}: expected at least 1 token")
    if len(tokens) < context + 1:
        raise ConfigError(
            f"the text has {len(tokens)} tokens, fewer than one window of context {context} + 1: "
            "give a longer text or a smaller context"
        )
