"""The dense layout: every row has room for the whole context, allocated once.

Each stream is one tensor (layers, B, heads, context, width), so that a row's entries are adjacent and a span
of them is a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from tinylm.cache.protocol import Batch, Kernel, Stream
from tinylm.config import ConfigError


@dataclass(frozen=True)
class DensePlan:
    write: slice | Tensor  # the entries to fill: the same of every row, or (B, T) of them
    span: int  # entries 0..span of each row are read
    mask: Tensor | None  # bool, broadcastable to (B, H, T, span), True: attend
    is_causal: bool


class DenseCache:
    """Room for `batch` rows of `context` tokens. `nbytes` counts exactly what it allocated."""

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        layers: int,
        batch: int,
        context: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.context, self.dtype = context, dtype
        # Zeros, not empty: what a mask hides still enters as 0 * value, and 0 * NaN is NaN.
        self.streams = {
            name: torch.zeros(layers, batch, heads, context, width, device=device, dtype=dtype)
            for name, heads, width in map(astuple, streams)
        }
        self.nbytes = sum(stream.nbytes for stream in self.streams.values())
        # Views made once: a compiler takes each layer's for a tensor of its own and writes it in place. Of views that
        # it sees being made it copies the whole layer. (enable_grad: a view of no_grad cannot be written outside it.)
        with torch.enable_grad():
            self._layers = {name: [stream[n] for n in range(layers)] for name, stream in self.streams.items()}
        self._rows = torch.arange(batch, device=device)[:, None]
        self.made_for = (tuple(streams), layers, self._rows.device)

    def check_room(self, rows: int, span: int) -> None:
        if span > self.context:
            raise ConfigError(
                f"{span} tokens a row are more than the {self.context} that the cache has room for: "
                f"make it with context={span}"
            )
        if rows != len(self._rows):
            raise ConfigError(f"{rows} rows given, the cache has {len(self._rows)}: make it with batch={rows}")

    def plan(self, batch: Batch) -> DensePlan:
        """Raises ConfigError if the batch does not fit."""
        rows, new = batch.tokens.shape
        self.check_room(rows, batch.span)
        span = batch.span
        if not batch.uniform:
            entry = torch.arange(span, device=batch.tokens.device)
            mask = entry < batch.lengths[:, None, None]
            if new > 1:
                mask = mask & (entry <= batch.positions[..., None])
            return DensePlan(batch.positions, span, mask[:, None], is_causal=False)
        write = slice(batch.start, span)
        if new == 1:  # one query sees every entry, and without a mask SDPA may use its flash kernels
            return DensePlan(write, span, None, is_causal=False)
        if batch.start == 0:
            return DensePlan(write, span, None, is_causal=True)
        # SDPA's is_causal aligns top left: query 0 would see entry 0 only. Here it sees all up to its own.
        mask = torch.ones(new, span, dtype=torch.bool, device=batch.tokens.device).tril(batch.start)
        return DensePlan(write, span, mask, is_causal=False)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: Any, kernel: Kernel) -> Tensor:
        keys, values = (self._update(name, layer, new, plan) for name, new in (("k", k), ("v", v)))
        mask, is_causal = plan.mask, plan.is_causal
        if q.shape[2] < k.shape[2]:  # the last token's query alone, which sees all that the others see
            mask, is_causal = None if mask is None else mask.any(-2, keepdim=True), False
        return kernel(q, keys.to(q.dtype), values.to(q.dtype), mask=mask, is_causal=is_causal)

    def _update(self, name: str, layer: int, new: Tensor, plan: DensePlan) -> Tensor:
        stored = self._layers[name][layer]  # (B, H_kv, context, D)
        if isinstance(plan.write, slice):
            stored[:, :, plan.write] = new
        else:
            stored[self._rows, :, plan.write] = new.transpose(1, 2).to(self.dtype)
        return stored[:, :, : plan.span]

    def reset(self) -> None:
        for stream in self.streams.values():
            stream.zero_()
