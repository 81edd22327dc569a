"""What a cache is. Shapes: B rows, T new tokens, S entries of a row, H heads, D width of a head.

Two axes, kept apart: content (the streams that attention declares per token) and layout (where they live).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tinylm.config import ConfigError


@dataclass(frozen=True)
class Stream:
    """What attention stores per token and layer under one name: `heads` vectors of `width` numbers."""

    name: str
    heads: int
    width: int


@dataclass(frozen=True)
class Batch:
    """One step's tokens and where they belong. Positions and lengths are on the device for CUDA graphs."""

    tokens: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64; also the entry of the row's cache that each token fills
    lengths: Tensor  # (B,) int64: valid entries of each row after this step
    span: int  # no row has more entries after this step; on the host, so the same at each replay of a graph
    uniform: bool  # every row has exactly `span` entries after this step, so that decode needs no mask

    @property
    def start(self) -> int:
        """Entries that every row had before this step; for uniform batches only."""
        return self.span - self.tokens.shape[1]

    @classmethod
    def at(cls, tokens: Tensor, start: int) -> Batch:
        """All rows continue at position `start`."""
        rows, new = tokens.shape
        positions = torch.arange(start, start + new, device=tokens.device).expand(rows, new)
        lengths = torch.full((rows,), start + new, device=tokens.device)
        return cls(tokens, positions, lengths, span=start + new, uniform=True)

    @classmethod
    def ragged(cls, tokens: Tensor, starts: list[int], counts: list[int]) -> Batch:
        """Row b continues at starts[b] with its first counts[b] tokens; the rest of the row is padding."""
        rows, new = tokens.shape
        if not len(starts) == len(counts) == rows or not all(0 < count <= new for count in counts):
            raise ConfigError(f"starts {starts}, counts {counts}: give {rows} of each, counts in 1..{new}")
        first = torch.tensor(starts, device=tokens.device)
        positions = first[:, None] + torch.arange(new, device=tokens.device)
        lengths = first + torch.tensor(counts, device=tokens.device)
        return cls(tokens, positions, lengths, span=max(starts) + new, uniform=False)


# Attention proper: (q (B, H, T, D), k (B, H_kv, S, D), v (B, H_kv, S, D), *, mask, is_causal) -> (B, H, T,
# D).
Kernel = Callable[..., Tensor]


class Cache(Protocol):
    """Where keys and values live. Planned once a step, used once a layer."""

    made_for: tuple[tuple[Stream, ...], int, torch.device]  # what a token stores in a layer, layers, where
    dtype: torch.dtype
    nbytes: int

    def check_room(self, rows: int, span: int) -> None:
        """Raises ConfigError unless it is for so many rows, and has room for `span` entries of each."""

    def plan(self, batch: Batch) -> Any:
        """What is the same for all layers of this step: where to write, what to read, the mask."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: Any, kernel: Kernel) -> Tensor:
        """Stores k and v (B, H_kv, T, D), then attention of q (B, H, T, D) over the row's entries."""

    def reset(self) -> None:
        """Forgets everything."""
